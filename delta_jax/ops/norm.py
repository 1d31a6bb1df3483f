"""What brings vectors to length one, for entries of any size."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from delta_jax.ops.precision import accumulator_dtype

__all__ = ["EPS", "inverse_length", "unit_length"]

EPS = 1e-6  # of the length of queries and keys
SMALLEST = 1e-35  # the root of the smallest eps that counts, which float32 still holds with all its bits


def unit_length(x: Float[Array, "*leading size"], eps: float) -> Float[Array, "*leading size"]:
    """`x / sqrt(sum(x^2) + eps)` over the last axis, in the dtype of x.

    Where one entry is not finite all are NaN, by selection: the cotangents there are zero.
    """
    finite = jnp.all(jnp.isfinite(x), axis=-1, keepdims=True)  # on a CPU a maximum may pass over NaN
    clean = jnp.where(finite, x, jnp.zeros((), x.dtype))
    power, rest = inverse_length(clean, eps)
    y = (clean.astype(rest.dtype) * power * rest).astype(x.dtype)
    return jnp.where(finite, y, jnp.asarray(jnp.nan, x.dtype))


def inverse_length(
    x: Float[Array, "*leading size"], eps: float, reduce: Callable[..., Array] = jnp.sum
) -> tuple[Float[Array, "*leading 1"], Float[Array, "*leading 1"]]:
    """Two factors whose product is `1 / sqrt(reduce(x^2) + eps)`, in float32 (float64 for float64 x).

    The first is a power of two that brings the largest entry, or the root of eps, between a half and one: the squares of
    x times it neither overflow nor vanish, and where they did neither before, nothing is rounded in another way.
    """
    wide = x.astype(accumulator_dtype(x.dtype))
    root = max(math.sqrt(eps), SMALLEST)
    largest = jnp.max(jnp.abs(jax.lax.stop_gradient(x)), axis=-1, keepdims=True, initial=0.0).astype(wide.dtype)
    _, exponent = jnp.frexp(jnp.maximum(largest, root))
    limit = -int(jnp.finfo(wide.dtype).minexp)
    power = jnp.ldexp(jnp.ones((), wide.dtype), jnp.clip(-exponent, -limit, limit))
    squares = reduce(jnp.square(wide * power), axis=-1, keepdims=True)
    return power, jax.lax.rsqrt(squares + jnp.square(root * power))
