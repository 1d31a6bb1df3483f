"""Gates per channel: a chunk's decays by the block size at which two tokens meet.

Decayed scores, sum_d x_i[d] k_j[d] exp(g_{j+1}[d] + ... + g_i[d]) for i > j, are split by the block size n at which i and j
meet (1, 2, ..., 32; j in the left half of a block of 2 n tokens, i in the right). The exponent is a sum over the tokens from
j to the middle of that block and one from there to i: a level is one product of factors on queries and keys, none of which
is above one for gates that are not above zero. The exponents of a level are a product too: a matrix of zeros and ones, which
gates every token takes, with the gates, in float32 as the sum of two bfloat16. They are sums over the very tokens they
belong to, never differences of sums, so a gate of any size leaves its neighbours exact.
"""

from collections.abc import Callable
from typing import Literal

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu.plan import CHUNK
from pallas_kernels.gpu.warpgroup import Ref, indices, product, put_split, read
from pallas_kernels.inputs import base_two

Level = int | Array | Literal["start", "end"]


def over_levels[T](body: Callable[[Array, T], T], carry: T) -> T:
    """Runs `body(size, carry)` for the sizes 1, 2, ..., 32: a loop, since its body is long."""

    def step(_: Array, now: tuple[Array, T]) -> tuple[Array, T]:
        size, carry = now
        return 2 * size, body(size, carry)

    return lax.fori_loop(0, CHUNK.bit_length() - 1, step, (jnp.int32(1), carry))[1]


def meets(size: int | Array, *, both_ways: bool = False) -> Array:
    """Which pairs of tokens meet in a block of two times `size`: the row right of its middle, the column left.

    With `both_ways` also the row left and the column right.
    """
    row, column = indices(CHUNK, CHUNK)
    other = (row & -size) ^ size
    if not both_ways:
        other = jnp.where((row & size) > 0, other, -1)
    return (column & -size) == other


def takes(level: Level) -> Array:
    """Ones for the gates (columns) in a token's factor (rows): up to it from the middle of its block, or after it to there.

    From the start of the chunk, or to its end, likewise.
    """
    token, gate = indices(CHUNK, CHUNK)
    if isinstance(level, str):
        return jnp.where(gate <= token if level == "start" else gate > token, 1.0, 0.0)
    right = (token & level) > 0
    first, last = jnp.where(right, token & -level, token + 1), jnp.where(right, token, token | (level - 1))
    return jnp.where((gate >= first) & (gate <= last), 1.0, 0.0)


def put_gates(target: Ref, gates: Ref) -> None:
    """Splits gates `[64, channels]` as they were given, in base two."""
    put_split(target, base_two(read(gates)))


def factors(gates: Ref, taken: Ref) -> Array:
    """The decays `[64, channels]` of the level whose `takes` were put in `taken`, of split gates `[2, 64, channels]`."""
    plgpu.commit_smem()
    return jnp.exp2(product((taken, gates.at[0]), (taken, gates.at[1])))
