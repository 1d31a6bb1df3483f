"""The inverse of unit lower-triangular matrices in float32, from blocks of 16 to blocks of 64, safe on repeated keys.

The eight diagonal blocks of 16 of a tile of 128 tokens lie on lanes of their own, so they are one array `[16, 128]`, and
substitution on the vector unit inverts them together:

    X <- X - a_j x_j      j = 0 ... 14,      a_j column j of every block, x_j row j of the inverse so far

Two levels of X21 = -X22 A21 X11 on the MXU make the two blocks of 64 of them. The small products of a level share one
product: the left factors lie side by side on the lanes, the right ones on the diagonal of one 128 x 128 matrix. Half of a
head's lanes hold the left blocks X11, so two heads fill them. Only blocks of the inverse are multiplied, never powers of A.

Source: the recursion of `delta_jax.ops.inverse` (arXiv 2605.21325 section 3); substitution: any text on linear algebra.
"""

import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu.products import TILE, float32_product, lanes, rows, split

BASE = 16
LOWER_COLUMNS, UPPER_COLUMNS = (
    15,
    7,
)  # the columns that have something below the diagonal in rows 8 to 15, and in 0 to 7


def base_columns(a: Array, lower: Array, upper: Array) -> None:
    """Column j of every block of `a`, `[16, 128]`, repeated over the block's lanes: what substitution multiplies with.

    What is not below a diagonal is not read. `lower` `[15, 8, 128]` gets rows 8 to 15 of columns 0 to 14, `upper`
    `[7, 8, 128]` rows 0 to 7 of columns 0 to 6.
    """
    row, lane = rows(BASE, TILE), lanes(BASE, TILE)
    a = jnp.where(lane % BASE < row, a, 0.0)
    block = lane[:8] // BASE * BASE
    for j in range(LOWER_COLUMNS):
        lower[j] = jnp.take_along_axis(a[8:], block + j, axis=1)
        if j < UPPER_COLUMNS:
            upper[j] = jnp.take_along_axis(a[:8], block + j, axis=1)


def invert_base(lower: Array, upper: Array) -> tuple[Array, Array]:
    """Inverses of I + a for the blocks of `base_columns`, side by side, as rows 0 to 7 and 8 to 15, `[8, 128]` each."""
    row, lane = rows(BASE, TILE), lanes(BASE, TILE)
    x = jnp.where(lane % BASE == row, 1.0, 0.0).astype(jnp.float32)
    top, bottom = x[:8], x[8:]
    for j in range(LOWER_COLUMNS):
        solved = (top if j < 8 else bottom)[j % 8 : j % 8 + 1]
        if j < UPPER_COLUMNS:
            top = top - upper[j] * solved
        bottom = bottom - lower[j] * solved
    return top, bottom


def merge_right(first: Array, second: Array, first_corner: Array, second_corner: Array, exact: bool) -> Array:
    """A21 X11 of two heads from their inverted blocks `[size, 128]`: the first head's on even blocks of lanes."""
    x11 = _interleave(first, pltpu.roll(second, len(first), 1))
    a21 = _interleave(first_corner, pltpu.roll(second_corner, len(first), 1))
    return float32_product(a21, _on_diagonal(x11, exact))


def merge_left(first: Array, second: Array, right: Array, exact: bool) -> tuple[Array, Array]:
    """The inverted blocks of twice the size, `[2 * size, 128]` for both heads, given A21 X11."""
    size = len(first)
    x22 = _interleave(pltpu.roll(first, TILE - size, 1), second)
    x21 = -float32_product(x22, _on_diagonal(right, exact))
    corners = x21, pltpu.roll(x21, TILE - size, 1)
    zero = jnp.zeros_like(first)
    done = [
        jnp.concatenate([_interleave(x, zero), _interleave(corner, x)], 0)
        for x, corner in zip((first, second), corners, strict=True)
    ]
    return done[0], done[1]


def _interleave(even: Array, odd: Array) -> Array:
    """Even blocks of lanes from one array, odd ones from the other; blocks are as wide as the arrays are high."""
    return jnp.where(lanes(*even.shape) // len(even) % 2 == 0, even, odd)


def _on_diagonal(blocks: Array, exact: bool) -> tuple[Array, ...]:
    """Blocks that lie side by side, `[size, 128]`, on the diagonal of a 128 x 128 matrix, whole or `split`."""
    size = len(blocks)
    diagonal = rows(TILE, TILE) // size == lanes(TILE, TILE) // size
    parts = (blocks,) if exact else split(blocks)
    return tuple(jnp.where(diagonal, jnp.concatenate([x] * (TILE // size), 0), jnp.zeros((), x.dtype)) for x in parts)
