"""Normalisation, always computed in float32."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

__all__ = ["RMSNorm", "l2_normalize"]


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation of the last axis: `y = x / sqrt(mean(x^2) + eps) * scale`.

    Source: Zhang and Sennrich, "Root mean square layer normalization", 2019, equation 4.
    """

    def __init__(self, size: int, *, eps: float = 1e-5, param_dtype: DTypeLike = jnp.float32):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((size,), param_dtype))

    def __call__(self, x: Float[Array, "*leading size"]) -> Float[Array, "*leading size"]:
        """Normalises x over its last axis and returns it in its own dtype."""
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        scale = self.scale[...].astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))
        return (wide * scale).astype(x.dtype)


def l2_normalize(x: Float[Array, "*leading size"], eps: float = 1e-6) -> Float[Array, "*leading size"]:
    """Divides x by its length over the last axis: `y = x / sqrt(sum(x^2) + eps)`, in the dtype of x."""
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.sum(jnp.square(wide), axis=-1, keepdims=True) + eps)).astype(x.dtype)
