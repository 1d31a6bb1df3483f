"""Runner for delta_jax's chunkwise form with a gate per head and per channel, and for one matmul of the same
FLOPs."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from benchmarks.problem import GATE_FLOOR, load
from benchmarks.timing import Case, jax_case, serve
from delta_jax import delta_rule
from delta_jax.ops.chunkwise import DEFAULT_CHUNK as CHUNK


def forward_flops(tokens: int, heads: int, key_size: int, value_size: int, chunk: int = CHUNK) -> int:
    """Floating point operations of the chunkwise forward, counting a product of (a, b) and (b, c) as 2abc.

    A token of a head takes part in 2CK for the keys times the keys, 2CK for the queries times the keys, 2KV
    each for what key and query read from the state, 2CV for the inverse of I + A, 2CV for the scores times
    the new values, and 2KV for the write to the state; C is the chunk. A masked product counts in full;
    forming the inverse and everything elementwise are not counted, so the one matmul of as many operations
    is, if anything, too small.
    """
    return tokens * heads * (4 * chunk * (key_size + value_size) + 6 * key_size * value_size)


def per_head(q: Array, k: Array, v: Array, beta: Array, g: Array) -> Array:
    """The output for log decays."""
    return delta_rule(q, k, v, beta, g, implementation="xla")[0]


def per_channel(q: Array, k: Array, v: Array, beta: Array, g: Array) -> Array:
    """The output for the raw bounded gate."""
    return delta_rule(q, k, v, beta, GATE_FLOOR * jax.nn.sigmoid(g), implementation="xla")[0]


def matmul(folder: Path) -> Case:
    """A product of two square float32 matrices with the FLOPs of the forward."""
    shape = load(folder, "gdn")[0]["v"].shape
    flops = forward_flops(shape[1], shape[2], shape[3], shape[3])
    size = round((flops / 2) ** (1 / 3))
    a, b = map(jnp.asarray, np.random.default_rng(0).standard_normal((2, size, size), np.float32))
    product = jax.jit(jnp.dot)
    return Case(
        calls={"forward": lambda: product(a, b).block_until_ready()},
        facts={"flops": flops, "size": size, "chunk": CHUNK},
    )


if __name__ == "__main__":
    problems = Path(sys.argv[1])
    cases = {"gdn": jax_case(per_head, problems, "gdn"), "kda": jax_case(per_channel, problems, "kda")}
    serve(cases | {"matmul": matmul(problems)}, ("delta_jax", "jax"))
