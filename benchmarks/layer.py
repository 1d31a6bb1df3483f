"""`python -m benchmarks.layer`: the bytes that XLA moves between a layer's projections and the op, on this device.

Compiles layers of published models for one sequence of 4096 tokens and prints a JSON line for each program: megabytes read
and written by the products, by the op itself, and by all else: norms, convolutions of a few tokens, gates, looks for what
is not finite, copies. Every instruction reads its operands and writes its result once, loops as often as they run. Nothing
runs; `benchmarks.tpu_schedule.layer` is the same for TPUs, with times.
"""

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from delta_jax.compiled.work import work_of
from delta_jax.layers import GatedDeltaNet

TOKENS, HIDDEN = 4096, 2048
LAYERS: dict[str, dict[str, Any]] = {
    "gated_delta_net_1.3b": {"num_heads": 6, "head_dim": 256, "expand_v": 2.0},
    "qwen3_next_80b_a3b": {"num_heads": 16, "head_dim": 128, "num_v_heads": 32, "expand_v": 1.0},
}
DIRECTIONS = ("forward", "forward_backward")
OP = "jit(_run)"  # what XLA calls the op with its containment


def program(name: str, direction: str, dtype: DTypeLike) -> tuple[Callable[..., Any], list[Any]]:
    """The function of a layer with the shapes of its arguments: parameters and tokens, all of them of one dtype."""
    make = lambda: GatedDeltaNet(HIDDEN, **LAYERS[name], dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0))  # noqa: E731
    structure, state = nnx.split(nnx.eval_shape(make), nnx.Param)
    parameters = nnx.to_pure_dict(state)
    x = jax.ShapeDtypeStruct((1, TOKENS, HIDDEN), dtype)

    def forward(parameters: Any, x: jax.Array) -> Any:
        return nnx.merge(structure, parameters)(x)

    def forward_backward(parameters: Any, x: jax.Array, d_y: jax.Array) -> Any:
        y, pull = jax.vjp(forward, parameters, x)
        return y, pull(d_y)

    return (forward, [parameters, x]) if direction == "forward" else (forward_backward, [parameters, x, x])


def line(hlo: str) -> dict[str, Any]:
    """The figures of a compiled program."""
    work = work_of(hlo, apart=OP)

    def megabytes(size: int) -> float:
        return round(size / 1e6, 1)

    return {
        "products_mb": megabytes(work.products.bytes),
        "op_mb": megabytes(work.apart.bytes),
        "other_mb": megabytes(work.others.bytes),
        "other_instructions": work.others.runs,
        "copies": work.copies,
    }


def main() -> None:
    """Compile and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.layer", description=__doc__.splitlines()[0])
    parser.add_argument("layer", nargs="?", choices=list(LAYERS), help="default both")
    parser.add_argument("direction", nargs="?", choices=DIRECTIONS, help="default both")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="default float32")
    options = parser.parse_args()
    for name in [options.layer] if options.layer else LAYERS:
        for direction in [options.direction] if options.direction else DIRECTIONS:
            function, arguments = program(name, direction, jnp.dtype(options.dtype))
            start = time.monotonic()
            hlo = jax.jit(function).lower(*arguments).compile().as_text() or ""
            about = {"device": jax.default_backend(), "layer": name, "direction": direction, "dtype": options.dtype}
            print(json.dumps(about | line(hlo) | {"compiled_in_s": round(time.monotonic() - start)}), flush=True)


if __name__ == "__main__":
    main()
