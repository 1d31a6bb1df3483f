"""Normalisation, always computed in float32."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from delta_jax.layers.contained import contained

__all__ = ["RMSNorm", "l2_normalize"]


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation of the last axis: `y = x / sqrt(mean(x^2) + eps) * scale`.

    The zero-centred form learns `offset = scale - 1`, so that weight decay pulls the scale towards 1, not to 0.

    Source: Zhang and Sennrich, "Root mean square layer normalization", 2019, equation 4; zero-centred as in Gemma
    and Qwen3-Next.
    """

    def __init__(
        self, size: int, *, eps: float = 1e-5, zero_centered: bool = False, param_dtype: DTypeLike = jnp.float32
    ):
        self.eps = eps
        self.zero_centered = zero_centered
        if zero_centered:
            self.offset = nnx.Param(jnp.zeros((size,), param_dtype))
        else:
            self.scale = nnx.Param(jnp.ones((size,), param_dtype))

    def __call__(self, x: Float[Array, "*leading size"]) -> Float[Array, "*leading size"]:
        """Normalises x over its last axis and returns it in its own dtype."""
        return contained(self._normalise, x, tokens=x.ndim - 1)

    def _normalise(self, x: Float[Array, "*leading size"]) -> Float[Array, "*leading size"]:
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        learned = (self.offset if self.zero_centered else self.scale)[...].astype(jnp.float32)
        scale = 1.0 + learned if self.zero_centered else learned
        return (wide * scale.reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


def l2_normalize(x: Float[Array, "*leading size"], eps: float = 1e-6) -> Float[Array, "*leading size"]:
    """Divides x by its length over the last axis: `y = x / sqrt(sum(x^2) + eps)`, in the dtype of x."""
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.sum(jnp.square(wide), axis=-1, keepdims=True) + eps)).astype(x.dtype)
