"""What brings vectors to length one, for entries of any size."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from delta_jax.ops.precision import accumulator_dtype

__all__ = ["EPS", "inverse_length", "normalised", "unit_length"]

EPS = 1e-6  # of the length of queries and keys
SMALLEST = 1e-35  # the root of the smallest eps that counts, which float32 still holds with all its bits
_UP, _SMALL = 2.0**90, 2.0**-60  # what vectors are multiplied with whose sum of squares is below


def unit_length(x: Float[Array, "*leading size"], eps: float) -> Float[Array, "*leading size"]:
    """`x / sqrt(sum(x^2) + eps)` over the last axis, in the dtype of x.

    Where one entry is not finite all are NaN, by selection: the cotangents there are zero.
    """
    y, finite = normalised(x, eps)
    return jnp.where(finite, y.astype(x.dtype), jnp.asarray(jnp.nan, x.dtype))


def normalised(
    x: Float[Array, "*leading size"], eps: float, reduce: Callable[..., Array] = jnp.sum
) -> tuple[Float[Array, "*leading size"], Bool[Array, "*leading 1"]]:
    """`x / sqrt(reduce(x^2) + eps)` over the last axis, in float32 (float64 for float64 x); and where all of x is finite.

    Elsewhere it is zero, and nothing passes back.
    """
    return _normalised(x, eps, reduce), _finite(_squares(jax.lax.stop_gradient(x), reduce))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _normalised(x: Array, eps: float, reduce: Callable[..., Array]) -> Array:
    power, rest, finite = _factors_where_finite(x, eps, reduce)
    return jnp.where(finite, x, jnp.zeros((), x.dtype)).astype(rest.dtype) * power * rest


@_normalised.defjvp
def _derivative(
    eps: float, reduce: Callable[..., Array], given: tuple[Array], tangents: tuple[Any]
) -> tuple[Array, Array]:
    # What is kept for it is x, as it is: in float32 it would be as large again.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def along(x: Array, d_x: Array) -> Array:
        y, (power, rest, finite) = _normalised(x, eps, reduce), _factors_where_finite(x, eps, reduce)
        d_x = d_x.astype(y.dtype)
        return jnp.where(finite, (d_x - y * reduce(y * d_x, axis=-1, keepdims=True)) * power * rest, 0.0)

    return _normalised(given[0], eps, reduce), along(given[0], tangents[0])


def inverse_length(
    x: Float[Array, "*leading size"], eps: float
) -> tuple[Float[Array, "*leading 1"], Float[Array, "*leading 1"]]:
    """Two factors whose product is `1 / sqrt(sum(x^2) + eps)`, in float32 (float64 for float64 x).

    The first is a power of two, one unless squares of x overflow or vanish; those of x times it do neither.
    """
    return _factors(_squares(x, jnp.sum), eps)


def _factors_where_finite(x: Array, eps: float, reduce: Callable[..., Array]) -> tuple[Array, Array, Array]:
    """The factors of `inverse_length`, the second zero where x is not finite; and where it is."""
    squares = _squares(x, reduce)
    (power, rest), finite = _factors(squares, eps), _finite(squares)
    return power, jnp.where(finite, rest, 0.0), finite


def _squares(x: Array, reduce: Callable[..., Array]) -> tuple[Array, Array, Array]:
    """Sums of squares: of x, of x times a power of two by which none overflows, and of x times one by which none vanishes.

    They take one look at x, where its largest entry would have to be known before any sum. The second is finite where x is.
    """
    wide = x.astype(accumulator_dtype(x.dtype))
    plain, down, up = (
        reduce(jnp.square(wide * factor), axis=-1, keepdims=True) for factor in (1.0, _down(wide.dtype), _UP)
    )
    return plain, down, up


def _finite(squares: tuple[Array, Array, Array]) -> Array:
    return jnp.isfinite(squares[1])


def _factors(squares: tuple[Array, Array, Array], eps: float) -> tuple[Array, Array]:
    plain, down, up = squares
    root = max(math.sqrt(eps), SMALLEST)
    large = ~jnp.isfinite(plain)
    power, found = jnp.where(large, _down(plain.dtype), 1.0), jnp.where(large, down, plain)
    if root * root < _SMALL:
        small = plain < _SMALL
        power, found = jnp.where(small, _UP, power), jnp.where(small, up, found)
    return power, jax.lax.rsqrt(found + jnp.square(root * power))


def _down(dtype: jnp.dtype) -> Array:
    """A power of two that brings the largest number far below the root of it, and the root far above the smallest."""
    return jnp.asarray(2.0 ** -(jnp.finfo(dtype).maxexp // 2 + 16), dtype)
