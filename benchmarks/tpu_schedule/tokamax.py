"""tokamax's kernels, compiled in an environment of their own (`make peers` builds it)."""

import json
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.timing import MARK

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".venv-peers" / "bin" / "python"
MODULE = "benchmarks.peers.tokamax_kda_tpu"
GENERATIONS = ("v6e", "tpu7x")
WORKLOADS = ((32, 8192, 0), (32, 8192, 25))  # heads, tokens, segments: those that its authors time


def records(python: str, module: str, *arguments: str) -> list[dict[str, Any]]:
    """What a process prints on its marked lines.

    Raises:
      RuntimeError: when it ends with an error, in the words of its last line.
    """
    done = subprocess.run([python, "-m", module, *arguments], cwd=ROOT, text=True, capture_output=True)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    return [json.loads(line.removeprefix(MARK)) for line in done.stdout.splitlines() if line.startswith(MARK)]


def tokamax_rows(
    generation: str, workloads: Iterable[tuple[int, int, int]], console: Console
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The rows of a generation, and what is left out: name to reason."""
    if generation not in GENERATIONS:
        return [], {f"tokamax on {generation}": "its kernels ask for v6e or newer"}
    rows, left_out = [], {}
    for workload in workloads:
        heads, _, segments = workload
        name = f"tokamax with {heads} heads{f' and {segments} segments' if segments else ''} on {generation}"
        if not PYTHON.exists():
            left_out[name] = "its environment is not built: make peers"
            continue
        console.print(f"{name} ...")
        try:
            rows += records(str(PYTHON), MODULE, generation, *map(str, workload))
        except (RuntimeError, OSError) as error:
            left_out[name] = str(error)
    return rows, left_out
