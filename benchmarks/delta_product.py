"""`python -m benchmarks.delta_product`: several writes a token beside Gated DeltaNet at the same T, forward and backward.

The third way is the one delta_product replaces: the delta rule on a sequence of T * n_h tokens, whose queries are zero but
for one in n_h. All are called in turns, so that a slow minute of the machine meets all.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from rich.console import Console
from rich.table import Table

from benchmarks.options import number
from benchmarks.problem import NAMES, make_inputs
from benchmarks.timing import temporary_bytes
from delta_jax import delta_product, delta_rule


def interleaved(q: Array, k: Array, v: Array, beta: Array, g: Array) -> tuple[Array, Array]:
    """`delta_product` as one long delta rule."""
    writes = k.shape[2]

    def place(x: Array, at: int) -> Array:
        widths = ((0, 0), (0, 0), (at, writes - 1 - at)) + ((0, 0),) * (x.ndim - 2)
        return jnp.pad(x[:, :, None], widths).reshape(x.shape[0], -1, *x.shape[2:])

    k, v, beta = (x.reshape(x.shape[0], -1, *x.shape[3:]) for x in (k, v, beta))
    o, state = delta_rule(place(q, writes - 1), k, v, beta, place(g, 0), implementation="xla")
    return o[:, writes - 1 :: writes], state


def compiled(op: Callable[..., tuple[Array, Array]], arguments: list[Array]) -> Any:
    """The op and the gradients of its arguments but the last, which is the output's cotangent."""

    def forward_backward(*arguments: Array) -> tuple[Array, tuple[Array, ...]]:
        o, pull = jax.vjp(lambda *x: op(*x)[0], *arguments[:-1])
        return o, pull(arguments[-1])

    return jax.jit(forward_backward).lower(*arguments).compile()


def measure(tokens: int, heads: int, size: int, writes: int, rounds: int) -> dict[str, dict[str, float]]:
    """Median milliseconds, the median over the rounds of the ratio to Gated DeltaNet, and megabytes besides arguments."""
    draws = [make_inputs(tokens, heads, size, size, per_channel=False, seed=seed) for seed in range(writes)]
    one = {name: jnp.asarray(draws[0][name]) for name in (*NAMES, "do")}
    many = one | {name: jnp.asarray(np.stack([draw[name] for draw in draws], 2)) for name in ("k", "v", "beta")}
    ways: dict[str, tuple[Callable[..., Any], dict[str, Array]]] = {
        "gated delta net": (lambda *x: delta_rule(*x, implementation="xla"), one),
        f"delta product, n_h = {writes}": (lambda *x: delta_product(*x, implementation="xla"), many),
        "the same, interleaved": (interleaved, many),
    }
    calls = {name: (compiled(op, list(x.values())), list(x.values())) for name, (op, x) in ways.items()}
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(rounds + 1):
        for name, (call, arguments) in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call(*arguments))
            if round_:
                taken[name].append(1e3 * (time.perf_counter() - start))
    base = taken["gated delta net"]
    return {
        name: {
            "ms": median(taken[name]),
            "ratio": median(mine / other for mine, other in zip(taken[name], base, strict=True)),
            "results_mb": call.memory_analysis().output_size_in_bytes / 1e6,
            "temporary_mb": temporary_bytes(call) / 1e6,
        }
        for name, (call, _) in calls.items()
    }


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.delta_product", description="Several writes a token beside Gated DeltaNet."
    )
    for name, default in {"tokens": 2048, "heads": 4, "size": 128, "writes": 3, "rounds": 15}.items():
        parser.add_argument(f"--{name}", type=number, default=default, help="default %(default)s")
    options = vars(parser.parse_args())
    table = Table("forward and backward", "ms", "ratio", "results, MB", "temporary, MB", title=str(options))
    for way, row in measure(**options).items():
        table.add_row(way, *(f"{number:.2f}" for number in row.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
