"""`python -m benchmarks.cpu`: this library beside the other implementations, on the CPU, in one run.

The problem is the training shape float32, B=1, T=2048, H=8, K=V=128 with a decay gate: the output
("forward"), and the output with the gradients of q, k, v, beta and g ("forward + backward"). Every
implementation runs in a process of its own, in its own environment (`make peers` builds those); all get the
same inputs and are checked against the float64 recurrence, and one that is not installed is left out by
name. The processes stay alive and take turns: a round times each of them in both directions, and a ratio is
taken within a round, so that a slow minute of the machine meets all. `--sweep` adds the chunkwise form
against the recurrence over T = 256 ... 16384.

Writes cpu.json and cpu.md into the folder given by --output.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console

from benchmarks.options import folder, number, seconds
from benchmarks.problem import make_inputs, save
from benchmarks.report import report_markdown, write
from benchmarks.timing import MARK
from experiments.harness.results import machine

ROOT = Path(__file__).resolve().parents[1]
SHAPE = {"tokens": 2048, "heads": 8, "key_size": 128, "value_size": 128}
DIRECTIONS = ("forward", "forward_backward")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One implementation: its name in the tables, the problem it solves, and who runs it."""

    name: str
    case: str
    module: str
    environment: str | None = None
    blas_threads: int | None = None


OURS = Row(name="delta_jax, gate per head", case="gdn", module="benchmarks.ours")
OURS_PER_CHANNEL = Row(name="delta_jax, gate per channel", case="kda", module="benchmarks.ours")
MATMUL = Row(name="one matmul, FLOPs of our forward", case="matmul", module="benchmarks.ours")
PEERS = (
    Row(
        name="tokamax xla_chunked (KDA)",
        case="kda",
        module="benchmarks.peers.tokamax_kda",
        environment=".venv-peers",
    ),
    Row(name="MaxText (GDN)", case="gdn", module="benchmarks.peers.maxtext_gdn", environment=".venv-peers"),
    Row(
        name="MaxText (GDN), one BLAS thread",
        case="gdn",
        module="benchmarks.peers.maxtext_gdn",
        environment=".venv-peers",
        blas_threads=1,
    ),
    Row(
        name="jax-linear-attention (GDN)",
        case="gdn",
        module="benchmarks.peers.jla_gdn",
        environment=".venv-peers-jla",
    ),
    Row(
        name="jax-linear-attention (GDN), one BLAS thread",
        case="gdn",
        module="benchmarks.peers.jla_gdn",
        environment=".venv-peers-jla",
        blas_threads=1,
    ),
    Row(
        name="transformers torch (GDN)",
        case="gdn",
        module="benchmarks.peers.transformers_gdn",
        environment=".venv-peers-torch",
    ),
)


class Runner:
    """A process that holds the compiled cases of one module and times them on request."""

    def __init__(self, row: Row, problems: Path) -> None:
        python = sys.executable if row.environment is None else str(ROOT / row.environment / "bin" / "python")
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        if row.blas_threads is not None:
            environment["OPENBLAS_NUM_THREADS"] = str(row.blas_threads)
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed in close()
        self.process = subprocess.Popen(
            [python, "-m", row.module, str(problems)],
            cwd=ROOT,
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
        )
        self.announcement = self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))
        self.process.wait()
        self.errors.seek(0)
        lines = self.errors.read().strip().splitlines()
        raise RuntimeError(lines[-1] if lines else f"it ended with exit code {self.process.returncode}")

    def time(self, case: str, direction: str, seconds: float) -> list[float]:
        """Milliseconds of each repeat."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"case": case, "direction": direction, "seconds": seconds}) + "\n")
        self.process.stdin.flush()
        return self._answer()["ms"]

    def close(self) -> None:
        """Let the process end."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
        self.errors.close()


def reason_left_out(row: Row) -> str | None:
    """Why an implementation cannot run, or None when its environment is there."""
    if row.environment is None:
        return None
    folder = ROOT / row.environment
    if (folder / "left_out.txt").exists():
        return (folder / "left_out.txt").read_text().strip()
    return None if (folder / "bin" / "python").exists() else f"{row.environment} is not there; `make peers` builds it"


def compare(rounds: int, seconds: float, console: Console) -> dict[str, Any]:
    """Time every implementation in interleaved rounds.

    Args:
        rounds: how often each implementation has its turn.
        seconds: time that one direction of one implementation takes in a round (two repeats at least).
        console: where progress goes.

    Returns:
        "rows" (name, times, facts, versions), "left_out" (name to reason).
    """
    rows = (OURS, MATMUL, *PEERS, OURS_PER_CHANNEL)
    runners: dict[Row, Runner] = {}
    own: Runner | None = None
    left_out: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        for problem in ("gdn", "kda"):
            save(Path(folder), problem, make_inputs(**SHAPE, per_channel=problem == "kda"))
        for row in rows:
            if reason := reason_left_out(row):
                left_out[row.name] = reason
                continue
            console.print(f"compiling and checking {row.name} ...")
            if row.environment is None:
                own = own or Runner(row, Path(folder))
                runners[row] = own
                continue
            try:
                runners[row] = Runner(row, Path(folder))
            except RuntimeError as error:
                left_out[row.name] = str(error)
        times: dict[Row, dict[str, list[list[float]]]] = {row: {d: [] for d in DIRECTIONS} for row in runners}
        for number in range(rounds):
            console.print(f"round {number + 1} of {rounds} ...")
            for row, runner in runners.items():
                for direction in DIRECTIONS if row is not MATMUL else DIRECTIONS[:1]:
                    times[row][direction].append(runner.time(row.case, direction, seconds))
    found = [
        {
            "name": row.name,
            "problem": row.case,
            "ms": times[row],
            "versions": runner.announcement["versions"],
            **runner.announcement["facts"][row.case],
        }
        for row, runner in runners.items()
    ]
    for runner in set(runners.values()):
        runner.close()
    return {"rows": [row | summarise(row["ms"], found) for row in found], "left_out": left_out}


def summarise(ms: dict[str, list[list[float]]], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Median and spread over the rounds (of each round's median), the fastest repeat, and the ratios to our
    rows.

    A ratio "median" is taken in each round, the ratio "fastest" is of the fastest repeats of the whole run:
    what is left when nothing else disturbs either side.
    """
    summary: dict[str, Any] = {}
    for direction, rounds in ms.items():
        if not rounds:
            continue
        middle = [median(repeats) for repeats in rounds]
        fastest = min(map(min, rounds))
        summary[direction] = {
            "median_ms": median(middle),
            "lowest_ms": min(middle),
            "highest_ms": max(middle),
            "fastest_ms": fastest,
        }
        for key, name in (("per_head", OURS.name), ("per_channel", OURS_PER_CHANNEL.name)):
            ours = next(row["ms"][direction] for row in rows if row["name"] == name)
            ratios = [theirs / median(repeats) for theirs, repeats in zip(middle, ours, strict=True)]
            summary[direction]["over_ours_" + key] = {
                "median": median(ratios),
                "lowest": min(ratios),
                "highest": max(ratios),
                "fastest": fastest / min(map(min, ours)),
            }
    return summary


def main() -> None:
    """Measure, print the tables, write the two files."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=number, default=5, help="turns of each implementation (default 5)")
    parser.add_argument("--seconds", type=seconds, default=1.0, help="seconds per turn and direction (default 1)")
    parser.add_argument("--sweep", action="store_true", help="also chunkwise against recurrence, T = 256 ... 16384")
    output = str(ROOT / "docs" / "benchmarks")
    parser.add_argument("--output", type=folder, default=output, help="folder of cpu.json, cpu.md")
    options = parser.parse_args()
    start = time.time()
    console = Console(stderr=True)
    result: dict[str, Any] = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": "python -m benchmarks.cpu " + " ".join(sys.argv[1:]),
        "machine": machine(),
        "shape": SHAPE,
        **compare(options.rounds, options.seconds, console),
    }
    if options.sweep:
        from benchmarks.sweep import sweep

        result["sweep"] = sweep(options.seconds, console)
    result["seconds"] = round(time.time() - start)
    text = report_markdown(result)
    write(options.output, "cpu", result, text)
    print(text)


if __name__ == "__main__":
    main()
