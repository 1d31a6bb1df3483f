"""`python -m benchmarks.tpu_schedule.layer v6e`: where the time of a whole layer goes, as the TPU compiler estimates it.

Compiles layers of published models in bfloat16 for one sequence of 4096 tokens and prints a JSON line for each program:
milliseconds of the products, of the Pallas kernels (by their cycles) and of all else that XLA runs, megabytes that this
"other" moves to and from HBM, and how many of its instructions are mere copies. No TPU is needed, and none has run
these: the figures are estimates, with the calibrated factor of the generation, good to what "least_ms" and "most_ms" say.
"""

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

from benchmarks.tpu_schedule import GENERATIONS
from benchmarks.tpu_schedule.compiler import compile_for  # sets the environment: before everything that imports JAX

import jax  # isort: skip
import jax.numpy as jnp  # isort: skip
from flax import nnx  # isort: skip

from delta_jax.compiled.schedule import Schedule  # isort: skip
from delta_jax.layers import GatedDeltaNet  # isort: skip

TOKENS, HIDDEN = 4096, 2048
LAYERS: dict[str, dict[str, Any]] = {
    "gated_delta_net_1.3b": {"num_heads": 6, "head_dim": 256, "expand_v": 2.0},
    "qwen3_next_80b_a3b": {"num_heads": 16, "head_dim": 128, "num_v_heads": 32, "expand_v": 1.0},
}
DIRECTIONS = ("forward", "forward_backward")


def program(name: str, direction: str) -> tuple[Callable[..., Any], list[Any]]:
    """The function of a layer with the shapes of its arguments: parameters and tokens, all of them bfloat16."""
    make = lambda: GatedDeltaNet(  # noqa: E731
        HIDDEN, **LAYERS[name], dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)
    )
    structure, state = nnx.split(nnx.eval_shape(make), nnx.Param)
    parameters = nnx.to_pure_dict(state)
    x = jax.ShapeDtypeStruct((1, TOKENS, HIDDEN), jnp.bfloat16)

    def forward(parameters: Any, x: jax.Array) -> Any:
        return nnx.merge(structure, parameters)(x)

    def forward_backward(parameters: Any, x: jax.Array, d_y: jax.Array) -> Any:
        y, pull = jax.vjp(forward, parameters, x)
        return y, pull(d_y)

    return (forward, [parameters, x]) if direction == "forward" else (forward_backward, [parameters, x, x])


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
            _, _, found, seconds = compile_for(options.generation, *program(name, direction))
            about = {"generation": options.generation, "layer": name, "direction": direction}
            print(json.dumps(about | line(found) | {"compiled_in_s": round(seconds)}), flush=True)


if __name__ == "__main__":
    main()
