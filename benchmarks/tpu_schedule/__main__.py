"""`python -m benchmarks.tpu_schedule`: static schedules of the TPU kernels, beside tokamax's and XLA's, on a CPU host.

Compiles the forward, the forward that keeps states with the backward, and the one-token step ahead of time with the real TPU
compiler for v5e, v5p, v6e and TPU7x, reads bundles, waits, occupancy, spills, VMEM and HBM traffic from what it dumps, and
estimates the milliseconds of a whole call: the kernels and what XLA runs around them, the L2 norm of the keys included.
Each generation runs in a process of its own; tokamax runs in its own environment (`make peers` builds it).

Writes tpu_schedule.json and tpu_schedule.md into the folder given by --output.
"""

import argparse
import sys
import time
from datetime import UTC, datetime
from typing import Any

from rich.console import Console

from benchmarks.options import folder
from benchmarks.report import write
from benchmarks.tpu_schedule import GENERATIONS
from benchmarks.tpu_schedule.page import page
from benchmarks.tpu_schedule.tokamax import ROOT, WORKLOADS, records, tokamax_rows


def collect(generations: list[str], console: Console) -> dict[str, Any]:
    """ "rows" of every program, and "left_out": name to reason."""
    rows: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    for generation in generations:
        console.print(f"{generation} ...")
        rows += records(sys.executable, "benchmarks.tpu_schedule.ours", generation)
        theirs, without = tokamax_rows(generation, WORKLOADS, console)
        rows += theirs
        left_out |= without
    return {"rows": rows, "left_out": left_out}


def main() -> None:
    """Compile, print the tables, write the two files."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tpu_schedule", description=__doc__.splitlines()[0])
    parser.add_argument("generations", nargs="*", choices=list(GENERATIONS), help="default all")
    parser.add_argument(
        "--output", type=folder, default=str(ROOT / "docs" / "benchmarks"), help="folder of the two files"
    )
    options = parser.parse_args()
    generations = options.generations or list(GENERATIONS)
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
