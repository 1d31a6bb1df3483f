"""`python -m benchmarks.tpu_schedule`: static schedules of the TPU kernels, beside tokamax's and XLA's, on a CPU host.

Compiles the forward, the forward that keeps states with the backward, and the one-token step ahead of time with the real TPU
compiler for v5e, v5p, v6e and TPU7x, and reads bundles, waits, occupancy, spills, VMEM and HBM traffic from what it dumps.
Each generation runs in a process of its own; tokamax runs in its own environment (`make peers` builds it).

Writes tpu_schedule.json and tpu_schedule.md into the folder given by --output.
"""

import argparse
import json
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.options import folder
from benchmarks.report import write
from benchmarks.timing import MARK
from benchmarks.tpu_schedule.chips import CHIPS
from benchmarks.tpu_schedule.page import page

ROOT = Path(__file__).resolve().parents[2]
PEERS = ROOT / ".venv-peers"
TOKAMAX = "benchmarks.peers.tokamax_kda_tpu"
TOKAMAX_GENERATIONS = ("v6e", "tpu7x")
TOKAMAX_SHAPES = ((32, 8192), (8, 8192))  # heads, tokens


def records(python: str, module: str, *arguments: str) -> list[dict[str, Any]]:
    """What a process prints on its marked lines.

    Raises:
      RuntimeError: when it ends with an error, in the words of its last line.
    """
    done = subprocess.run([python, "-m", module, *arguments], cwd=ROOT, text=True, capture_output=True)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    return [json.loads(line.removeprefix(MARK)) for line in done.stdout.splitlines() if line.startswith(MARK)]


def collect(generations: list[str], console: Console) -> dict[str, Any]:
    """ "rows" of every program, and "left_out": name to reason."""
    rows: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    for generation in generations:
        console.print(f"{generation} ...")
        rows += records(sys.executable, "benchmarks.tpu_schedule.ours", generation)
        if generation not in TOKAMAX_GENERATIONS:
            left_out[f"tokamax on {generation}"] = "its kernels ask for v6e or newer"
            continue
        for heads, tokens in TOKAMAX_SHAPES:
            name = f"tokamax with {heads} heads on {generation}"
            console.print(f"{name} ...")
            try:
                python = str(PEERS / "bin" / "python")
                rows += records(python, TOKAMAX, generation, str(heads), str(tokens))
            except (RuntimeError, OSError) as error:
                left_out[name] = str(error)
    return {"rows": rows, "left_out": left_out}


def main() -> None:
    """Compile, print the tables, write the two files."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tpu_schedule", description=__doc__.splitlines()[0])
    parser.add_argument("generations", nargs="*", choices=list(CHIPS), help="default all")
    parser.add_argument(
        "--output", type=folder, default=str(ROOT / "docs" / "benchmarks"), help="folder of the two files"
    )
    options = parser.parse_args()
    generations = options.generations or list(CHIPS)
    start = time.time()
    result = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": " ".join(["python -m benchmarks.tpu_schedule", *generations]),
        **collect(generations, Console(stderr=True)),
    }
    result["seconds"] = round(time.time() - start)
    text = page(result)
    write(options.output, "tpu_schedule", result, text)
    print(text)


if __name__ == "__main__":
    main()
