"""The inverse X of I + L, L strictly lower triangular `[64, 64]`, by block recursion from blocks of one.

With X_n the inverse of the diagonal blocks of n, and C the part of L that joins two of them,

    X_2n = X_n - X_n C X_n          C X_n = the rows and columns of L X_n that C has, since X_n is block diagonal

Only blocks of the inverse are multiplied, never powers of L. The products are float32 in three of bfloat16: with eigenvalues
below zero their sums cancel. The joins of blocks of 16 and of 32 multiply no more than they join, an eighth and a quarter of
the whole, which is why the matrices lie in tiles of 16 columns; a product has 64 rows at least.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu.levels import meets
from pallas_kernels.gpu.plan import CHUNK
from pallas_kernels.gpu.warpgroup import Ref, indices, product, products, put_split, read_split, shared, split_pairs

ALL = pl.ds(0, CHUNK)


class InverseScratch(NamedTuple):
    """Split matrices `[2, 64, 64]` in tiles of 16. Until `invert` begins, a caller may keep others in them."""

    lower: Ref  # L
    x: Ref  # X so far
    joined: Ref  # the C X_n of a level


def inverse_scratch() -> InverseScratch:
    return InverseScratch(*(shared(2, CHUNK, CHUNK, swizzle=32),) * 3)


def invert(matrix: Array, scratch: InverseScratch) -> None:
    """Writes X into `scratch.x`, from L."""
    lower, x, joined = scratch
    row, column = indices(CHUNK, CHUNK)
    result = jnp.where(row == column, 1.0, 0.0) - jnp.where((row ^ column) < 2, matrix, 0.0)
    put_split(lower, matrix)
    put_split(x, result)
    for n in (2, 4, 8):
        plgpu.commit_smem()
        put_split(joined, jnp.where(meets(n), product(*split_pairs(lower, x)), 0.0))
        plgpu.commit_smem()
        result = result - product(*split_pairs(x, joined))
        put_split(x, result)
    for n in (16, 32):
        lefts = [pl.ds(start, n) for start in range(0, CHUNK, 2 * n)]
        rights = [pl.ds(start, n) for start in range(n, CHUNK, 2 * n)]
        plgpu.commit_smem()
        crossing = products(*(split_pairs(_block(lower, ALL, left), _block(x, left, left)) for left in lefts))
        for left, c in zip(lefts, crossing, strict=True):
            put_split(_block(joined, ALL, left), c)
        plgpu.commit_smem()
        blocks = list(zip(lefts, rights, strict=True))
        below = products(*(split_pairs(_block(x, ALL, right), _block(joined, right, left)) for left, right in blocks))
        row, _ = indices(CHUNK, n)
        for (left, right), new in zip(blocks, below, strict=True):
            here = _block(x, ALL, left)
            is_new = (row >= right.start) & (row < right.start + n)
            # The compiler would carry out the negation of a product before the product is there, and wait for each alone.
            put_split(here, read_split(here) - jnp.where(is_new, new, 0.0))


def _block(split: Ref, rows: pl.Slice, columns: pl.Slice) -> tuple[Ref, ...]:
    return tuple(split.at[part, rows, columns] for part in (0, 1))
