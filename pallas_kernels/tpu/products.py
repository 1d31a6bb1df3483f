"""Products on the MXU at the precision of the inputs, and the index masks of a tile."""

import math
from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array, lax

TILE = 128  # tokens a tile: the lanes of a vector register


def product(a: Array, b: Array, exact: bool, *, transpose_b: bool = False) -> Array:
    """`a @ b` or `a @ b.T` in float32: full float32 operands if `exact`, else rounded to bfloat16, one pass of the MXU."""
    dtype = jnp.float32 if exact else jnp.bfloat16
    dimensions = (((1,), (1 if transpose_b else 0,)), ((), ()))
    precision = lax.Precision.HIGHEST if exact else lax.Precision.DEFAULT
    return lax.dot_general(
        a.astype(dtype), b.astype(dtype), dimensions, precision=precision, preferred_element_type=jnp.float32
    )


def split(x: Array) -> tuple[Array, Array]:
    """A float32 array as the sum of two bfloat16 arrays; what is lost is 2^-17 of it."""
    high = x.astype(jnp.bfloat16)
    return high, (x - high.astype(jnp.float32)).astype(jnp.bfloat16)


def float32_product(a: Array, b: tuple[Array, ...]) -> Array:
    """`a @ b` of float32 matrices, `b` given whole (six passes) or as its two `split` parts (three, error 2^-16)."""
    if len(b) == 1:
        return product(a, b[0], exact=True)
    high, low = split(a)
    both = product(jnp.concatenate([high, low], 0), b[0], exact=False)
    return both[: len(a)] + both[len(a) :] + product(high, b[1], exact=False)


def root_of(eps: float) -> float:
    """The root of an eps, but no less than what float32 still holds with all its bits."""
    return max(math.sqrt(eps), 1e-35)


def power_below(largest: Array) -> Array:
    """The power of two that brings positive float32 numbers between a half and one, as far as float32 has such powers."""
    exponent = lax.bitcast_convert_type(largest, jnp.int32) >> 23
    return lax.bitcast_convert_type(jnp.clip(253 - exponent, 1, 253) << 23, jnp.float32)


def rows(*shape: int) -> Array:
    return lax.broadcasted_iota(jnp.int32, shape, 0)


def lanes(*shape: int) -> Array:
    return lax.broadcasted_iota(jnp.int32, shape, 1)


def column(x: Array, index: int, width: int) -> Array:
    """Column `index` of a matrix, repeated over `width` lanes."""
    return jnp.broadcast_to(x[:, index : index + 1], (x.shape[0], width))


def transposed(x: Array) -> Array:
    """The transpose of a matrix whose rows may be fewer than a register's."""
    missing = -x.shape[0] % 8
    if missing:
        x = jnp.concatenate([x, jnp.zeros((missing, x.shape[1]), x.dtype)], 0)
    return jnp.swapaxes(x, 0, 1)


def row_sums(matrices: Sequence[Array]) -> Array:
    """The sums over the lanes of float32 matrices of one shape, a row for each matrix."""
    height, width = len(matrices[0]), -(-len(matrices) // 8) * 8
    columns = jnp.zeros((height, width), jnp.float32)
    for n, x in enumerate(matrices):
        columns = jnp.where(lanes(height, width) == n, jnp.sum(x, 1, keepdims=True), columns)
    return jnp.swapaxes(columns, 0, 1)[: len(matrices)]
