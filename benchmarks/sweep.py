"""The chunkwise form against the recurrence, forward and backward, over the length of the sequence."""

import functools
from collections.abc import Callable
from statistics import median
from typing import Any

import jax
from jax import Array
from rich.console import Console

from benchmarks.problem import NAMES, make_inputs
from benchmarks.timing import repeat, temporary_bytes
from delta_jax import delta_rule

LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384)
IMPLEMENTATIONS = ("xla", "recurrent")


def forward_backward(implementation: str, *arguments: Array) -> tuple[Array, tuple[Array, ...]]:
    """The output, and the gradients of q, k, v, beta and g for the output's cotangent, which comes last."""

    def forward(q: Array, k: Array, v: Array, beta: Array, g: Array) -> Array:
        return delta_rule(q, k, v, beta, g, implementation=implementation)[0]

    output, pull = jax.vjp(forward, *arguments[:-1])
    return output, pull(arguments[-1])


def sweep(seconds: float, console: Console, heads: int = 2, size: int = 128) -> dict[str, Any]:
    """Time both at every length, in turns.

    Args:
        seconds: time for each implementation at each length (two repeats at least).
        console: where progress goes.
        heads: number of heads.
        size: channels of keys and of values.

    Returns:
        "heads", "size" and "rows": tokens, and for each implementation the median milliseconds and extra
            memory.
    """
    rows = []
    for tokens in LENGTHS:
        console.print(f"T = {tokens} ...")
        inputs = make_inputs(tokens, heads, size, size, per_channel=False)
        arguments = [jax.numpy.asarray(inputs[name]) for name in (*NAMES, "do")]
        row: dict[str, Any] = {"tokens": tokens}
        for name in IMPLEMENTATIONS:
            compiled = jax.jit(functools.partial(forward_backward, name)).lower(*arguments).compile()
            call: Callable[[], Any] = functools.partial(lambda f, x: jax.block_until_ready(f(*x)), compiled, arguments)
            row[name] = {
                "median_ms": median(repeat(call, seconds)),
                "bytes": temporary_bytes(compiled),
            }
        rows.append(row | {"ratio": row["recurrent"]["median_ms"] / row["xla"]["median_ms"]})
    return {"heads": heads, "size": size, "rows": rows}
