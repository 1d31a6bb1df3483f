"""`python -m benchmarks.tpu_schedule.layer v6e`: where the time of a whole layer goes, as the TPU compiler estimates it.

Compiles layers of published models in bfloat16 for one sequence of 4096 tokens and prints a JSON line for each program:
milliseconds of the products, of the Pallas kernels (by their cycles) and of all else that XLA runs, megabytes that this
"other" moves to and from HBM, and how many of its instructions are mere copies. No TPU is needed, and none has run
these: the figures are estimates, with the calibrated factor of the generation, good to what "least_ms" and "most_ms" say.
"""

import argparse
import json
import sys
from typing import Any

from benchmarks.tpu_schedule import GENERATIONS
from benchmarks.tpu_schedule.compiler import compile_for  # sets the environment: before everything that imports JAX

import jax.numpy as jnp  # isort: skip

from benchmarks.layer import DIRECTIONS, LAYERS, program  # isort: skip
from delta_jax.compiled.schedule import Schedule  # isort: skip


def line(found: Schedule) -> dict[str, Any]:
    """The figures of a program."""
    work = found.work
    least, most = found.spread

    def milliseconds(cycles: int | float) -> float:
        return round(1e3 * found.seconds(cycles), 3)

    return {
        "whole_ms": milliseconds(found.cycles),
        "least_ms": milliseconds(least * found.cycles),
        "most_ms": milliseconds(most * found.cycles),
        "products_ms": milliseconds(work.products.cycles),
        "kernels_ms": milliseconds(found.kernel_cycles),
        "other_ms": milliseconds(work.others.cycles),
        "other_hbm_mb": round(work.others.bytes / 1e6),
        "prefetched_mb": round(work.ahead.bytes / 1e6),
        "other_instructions": work.others.runs,
        "copies": work.copies,
        "unestimated": dict(work.unestimated),
    }


def main() -> None:
    """Compile and print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tpu_schedule.layer", description=__doc__.splitlines()[0]
    )
    parser.add_argument("generation", choices=list(GENERATIONS))
    parser.add_argument("layer", nargs="?", choices=list(LAYERS), help="default both")
    parser.add_argument("direction", nargs="?", choices=DIRECTIONS, help="default both")
    options = parser.parse_args()
    for name in [options.layer] if options.layer else LAYERS:
        for direction in [options.direction] if options.direction else DIRECTIONS:
            print(f"compiling {name}, {direction}, for {options.generation} ...", file=sys.stderr, flush=True)
            _, _, found, seconds = compile_for(options.generation, *program(name, direction, jnp.bfloat16))
            about = {"generation": options.generation, "layer": name, "direction": direction}
            print(json.dumps(about | line(found) | {"compiled_in_s": round(seconds)}), flush=True)


if __name__ == "__main__":
    main()
