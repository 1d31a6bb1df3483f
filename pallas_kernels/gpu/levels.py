"""Gates per channel: a chunk's decays by the block size at which two tokens meet.

Decayed scores, sum_d x_i[d] k_j[d] exp(g_{j+1}[d] + ... + g_i[d]) for i > j, are split by the block size n at which i and j
meet (1, 2, ..., 32; j in the left half of a block of 2 n tokens, i in the right). The exponent is a sum over the tokens from
j to the middle of that block and one from there to i: a level is one product of factors on queries and keys, none of which
is above one for gates that are not above zero. The exponents of a level are a product too: a matrix of zeros and ones, which
gates every token takes, with the gates, in float32 as the sum of two bfloat16. They are sums over the very tokens they
belong to, never differences of sums, so a gate of any size leaves its neighbours exact.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu.plan import CHUNK
from pallas_kernels.gpu.products import product
from pallas_kernels.gpu.warpgroup import Ref, along_first, indices, load, loaded, put, read, shared
from pallas_kernels.inputs import base_two

SIZES = CHUNK.bit_length() - 1  # 1, 2, ..., 32
END, START = SIZES, SIZES + 1


def over_levels[T](body: Callable[[Array, T], T], carry: T) -> T:
    """Runs `body(level, carry)` for the sizes `1 << level`: a loop, since its body is long."""
    return lax.fori_loop(0, SIZES, body, carry)


def meets(size: int | Array, *, both_ways: bool = False) -> Array:
    """Which pairs of tokens meet in a block of two times `size`: the row right of its middle, the column left.

    With `both_ways` also the row left and the column right.
    """
    row, column = indices(CHUNK, CHUNK)
    other = (row & -size) ^ size
    if not both_ways:
        other = jnp.where((row & size) > 0, other, -1)
    return (column & -size) == other


def takes() -> Array:
    """Ones for the gates (columns) in a token's factor (rows), bfloat16 [levels, 64, 64].

    Those up to it from the middle of its block, or after it to there; then those to the chunk's end, and from its start.
    """
    token, gate = np.indices((CHUNK, CHUNK))
    up_to = gate <= token
    of_sizes = [
        np.where((token & size) > 0, up_to, ~up_to) & ((token ^ gate) < size) for size in (1 << n for n in range(SIZES))
    ]
    return jnp.asarray(np.stack([*of_sizes, ~up_to, up_to]), jnp.bfloat16)


class Taken(NamedTuple):
    """Shared memory for those of two levels in turn, odd and even: one is brought while the other is at work."""

    matrices: Ref  # [2, 64, 64]
    full: Ref

    def bring(self, source: Ref, level: int | Array) -> None:
        slot = level & 1
        load(self.full.at[slot], (source.at[level], self.matrices.at[slot]))

    def arrived(self, level: int | Array) -> Ref:
        """The matrix of a level that was brought."""
        loaded(self.full.at[level & 1])
        return self.matrices.at[level & 1]


def taken_scratch() -> Taken:
    return Taken(shared(2, CHUNK, CHUNK), plgpu.Barrier(num_barriers=2))


def put_gates(target: Ref, gates: Ref) -> None:
    """Splits gates `[64, channels]` as they were given, in base two."""
    put(along_first(target), base_two(read(gates)))


def factors(gates: Ref, taken: Ref) -> Array:
    """The decays `[64, channels]` of the level of a matrix of `takes`, of split gates `[2, 64, channels]`."""
    return jnp.exp2(product((taken, along_first(gates))))
