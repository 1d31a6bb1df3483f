"""`python -m benchmarks.gpu_schedule`: what NVIDIA's compiler makes of the GPU kernels, read on a machine without a GPU.

Compiles the forward, the backward and the one-token step of every shape ahead of time, reads registers, spills, shared
memory, warnings and machine code, and estimates the milliseconds of every kernel. With fewer shapes, chips or calls it is a
stop-watch for one kernel: `python -m benchmarks.gpu_schedule Qwen3-Next --calls forward`. Needs the extra "gpu-compiler".

Writes gpu_schedule.json and gpu_schedule.md into the folder given by --output, where one is given, with the estimate for
kernels of others whose time is published.
"""

import argparse
import sys
import time
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from benchmarks.gpu_schedule.compiler import schedule, traced_for  # sets the environment: before what imports JAX

import jax  # isort: skip
from benchmarks.gpu_schedule import CHIPS  # isort: skip
from benchmarks.gpu_schedule.page import page, tables  # isort: skip
from benchmarks.gpu_schedule.published import published  # isort: skip
from benchmarks.gpu_schedule.shapes import CALLS, CASES, Case, call_of  # isort: skip
from benchmarks.options import folder  # isort: skip
from benchmarks.report import write  # isort: skip
from delta_jax.parallel import GPUS  # isort: skip
from delta_jax.parallel.gpus import description  # isort: skip

PACKAGES = ("jax", "jax-cuda13-plugin", "nvidia-cuda-nvcc")


def row_of(case: Case, call: str, chip: str) -> dict[str, Any]:
    """A row of the table; a kernel that does not compile is one with its "error"."""
    about = {"chip": chip, "case": asdict(case), "call": call}
    try:
        with traced_for(chip):
            function, arguments, least = call_of(case, call)
        return about | {"bytes_least": least} | schedule(function, arguments, chip)
    except Exception as error:
        return about | {"error": str(error).strip().splitlines()[0][:300]}


def main() -> None:
    """Compile, print the tables, write the two files where a folder is given."""
    names = {case.name: case for case in CASES}
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_schedule", description=__doc__.splitlines()[0])
    parser.add_argument("shapes", nargs="*", choices=[[], *names], metavar="SHAPE", help=f"of {', '.join(names)}; all")
    parser.add_argument(
        "--chips", nargs="+", choices=list(GPUS), default=list(CHIPS), help=f"default {' '.join(CHIPS)}"
    )
    parser.add_argument("--calls", nargs="+", choices=CALLS, default=list(CALLS), help="default all")
    parser.add_argument("--output", type=folder, help="folder of gpu_schedule.json and gpu_schedule.md")
    options = parser.parse_args()
    try:
        for chip in options.chips:
            description(GPUS[chip])
    except ValueError as error:
        parser.error(str(error))
    start = time.time()
    rows = []
    for chip in options.chips:
        jax.clear_caches()  # a kernel that was lowered is one for another generation
        for name in options.shapes or names:
            for call in options.calls:
                print(f"{chip}, {name}, {call} ...", file=sys.stderr)
                rows.append(row_of(names[name], call, chip))
    result = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": " ".join(["python -m benchmarks.gpu_schedule", *options.shapes, "--chips", *options.chips]),
        "versions": {name: version(name) for name in PACKAGES},
        "rows": rows,
        "seconds": round(time.time() - start),
    }
    if options.output:
        result["published"] = published()
    print(tables(result))
    if options.output:
        write(options.output, "gpu_schedule", result, page(result))
    sys.exit(any("error" in row for row in rows))


if __name__ == "__main__":
    main()
