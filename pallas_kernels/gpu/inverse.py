"""The inverse X of I + L, L strictly lower triangular `[64, 64]`, by block recursion from blocks of one.

With X_n the inverse of the diagonal blocks of n, and C the part of L that joins two of them,

    X_2n = X_n - X_n C X_n          C X_n = the rows and columns of L X_n that C has, since X_n is block diagonal

Only blocks of the inverse are multiplied, never powers of L. The products are float32 in three of bfloat16: with eigenvalues
below zero their sums cancel.

Up to blocks of 16 what there is to know lies one block below another, `[64, 16]`, a quarter of the whole: a band of 16 rows
for each diagonal block. A product has 64 rows at least, so it multiplies all bands by the block of one, and of the four
products each band takes its own.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels.gpu.arrays import BETA
from pallas_kernels.gpu.plan import CHUNK
from pallas_kernels.gpu.products import Sum, commit, with_sums
from pallas_kernels.gpu.warpgroup import (
    Ref,
    along_columns,
    along_first,
    each_column,
    indices,
    put,
    shared,
    split_of,
    store,
    stored,
)

BAND = 16
BANDS = range(CHUNK // BAND)
HALF = CHUNK // 2


class InverseScratch(NamedTuple):
    """Shared memory: of split matrices the high part above the low one, which are written as one."""

    lower: Ref  # the diagonal blocks of L, [2 * 64, 16]
    bands: Ref  # those of X so far, likewise
    joined: Ref  # the C X_n of a level, likewise
    half: Ref  # [2 * 64, 32]
    half_joined: Ref
    x: Ref  # X, [2, 64, 64]


def inverse_scratch() -> InverseScratch:
    bands, half = shared(2 * CHUNK, BAND, swizzle=2 * BAND), shared(2 * CHUNK, HALF, swizzle=2 * HALF)
    return InverseScratch(bands, bands, bands, half, half, shared(2, CHUNK, CHUNK))


def finish(a: Array | None, scalars: Ref, target: Callable[[int], Ref]) -> None:
    """Ends a program that prepares a chunk: X = (I + A diag(beta))^-1 goes where `target(part)` says, if there is an A.

    What A has on the diagonal or above it does not count.
    """
    if a is None:
        stored(and_written=True)
        return
    matrix = a * each_column(along_columns(scalars.at[BETA]), CHUNK)

    def run(scratch: InverseScratch) -> None:
        invert(matrix, scratch)
        store(*((scratch.x.at[part], target(part)) for part in (0, 1)))
        stored(and_written=True)

    pl.run_scoped(run, inverse_scratch(), collective_axes="warpgroup")


def invert(matrix: Array, scratch: InverseScratch) -> None:
    """Writes X into `scratch.x`, from L, of which what lies on the diagonal or above it does not count."""
    row, column = indices(CHUNK, BAND)
    inside = row & (BAND - 1)
    columns = [_columns(matrix, BAND * band, BAND) for band in BANDS]
    diagonal = jnp.where(inside > column, _by_band(row, columns), 0.0)
    lower = _put(scratch.lower, diagonal)
    x = jnp.where(inside == column, 1.0, 0.0) - jnp.where((inside ^ column) < 2, diagonal, 0.0)
    for n in (2, 4, 8):
        left = _put(scratch.bands, x)
        commit()
        meet = ((inside ^ column) < 2 * n) & ((inside & n) > (column & n))
        joined = jnp.where(meet, _by_band(row, _products(lower, scratch.bands, BANDS)), 0.0)
        _put(scratch.joined, joined)
        commit()
        x = x - _by_band(row, _products(left, scratch.joined, BANDS))

    # Two blocks of 16: the rows of the bands 1 and 3, the columns of the bands 0 and 2.
    left = _put(scratch.bands, x)
    commit()
    first = row < HALF
    crossing = split_of(jnp.where(first, columns[0], columns[2]), 2)
    of_first, of_second = _products(crossing, scratch.bands, (0, 2))
    joined = jnp.where(first, of_first, of_second)
    _put(scratch.joined, joined)
    commit()
    of_first, of_second = _products(left, scratch.joined, (1, 3))
    below = jnp.where(first, of_first, of_second)
    band = lax.shift_right_logical(row, BAND.bit_length() - 1)
    blocks = [jnp.where(band == n, x, 0.0) for n in BANDS]
    for n in (0, 2):
        blocks[n] = blocks[n] - jnp.where(band == n + 1, below, 0.0)

    # Two blocks of 32.
    _put(scratch.half, jnp.concatenate(blocks[:2], 1))
    commit()
    (joined,) = _products(split_of(_columns(matrix, 0, HALF), 2), scratch.half, (0,))
    _put(scratch.half_joined, joined)
    commit()
    (below,) = _products(split_of(jnp.concatenate(blocks[2:], 1), 2), scratch.half_joined, (1,))
    row, _ = indices(CHUNK, HALF)
    left_half = jnp.concatenate(blocks[:2], 1) - jnp.where(row >= HALF, below, 0.0)
    put(along_first(scratch.x), jnp.concatenate([left_half, *blocks[2:]], 1))


def _columns(matrix: Array, start: int, width: int) -> Array:
    return lax.slice(matrix, (0, start), (CHUNK, start + width))


def _by_band(row: Array, blocks: Sequence[Array]) -> Array:
    """Of every block its band."""
    result = blocks[0]
    for n, block in enumerate(blocks[1:], 1):
        result = jnp.where(row >= BAND * n, block, result)
    return result


def _put(ref: Ref, x: Array) -> list[Ref]:
    """Splits and writes a matrix, of which it gives both parts."""
    ref[...] = jnp.concatenate(split_of(x, 2), 0)
    return _rows(ref, 0, CHUNK)


def _rows(ref: Ref, start: int, height: int) -> list[Ref]:
    """So many rows of both parts."""
    return [ref.at[pl.ds(part * CHUNK + start, height)] for part in (0, 1)]


def _products(left: Sequence[Any], right: Ref, blocks: Sequence[int]) -> list[Array]:
    """The products of a split matrix with square blocks, one below another, of a split matrix in shared memory."""
    size = right.shape[1]

    def run(*sums: Sum) -> list[Array]:
        for total, n in zip(sums, blocks, strict=True):
            total.add((left, _rows(right, size * n, size)))
        return [total.value() for total in sums]

    return with_sums(run, *((CHUNK, size) for _ in blocks))
