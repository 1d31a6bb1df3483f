"""Normalisation, computed in float32 at least, for entries of any size."""

from functools import partial

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from delta_jax.layers.checks import require_dtypes, require_flags, require_positive_integers, require_positive_numbers
from delta_jax.layers.convolution import unit_heads
from delta_jax.ops import device
from delta_jax.ops.arguments import checked_array
from delta_jax.ops.implementations import FEW_TOKENS
from delta_jax.ops.norm import EPS, normalised
from delta_jax.parallel import by_shares, shares

__all__ = ["RMSNorm", "l2_normalize"]


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation of the last axis: `y = x / sqrt(mean(x^2) + eps) * scale`.

    The zero-centred form learns `offset = scale - 1`, so that weight decay pulls the scale towards 1, not to 0.

    Args:
        size: of the last axis.
        eps: a positive number.
        zero_centered: the form.
        groups: equal parts of the axis, each of which is normalised by itself.
        param_dtype: of the scale or offset.

    Raises:
        ValueError: an option is impossible.

    Source: Zhang and Sennrich, "Root mean square layer normalization", 2019, equation 4; zero-centred as in Gemma
    and Qwen3-Next.

    Examples:
        >>> norm = RMSNorm(4)
        >>> y = norm(jnp.array([[1.0, -1.0, 3.0, 5.0]]))
        >>> bool(jnp.allclose(jnp.mean(y * y), 1.0, atol=1e-4))
        True
    """

    def __init__(
        self,
        size: int,
        *,
        eps: float = 1e-5,
        zero_centered: bool = False,
        groups: int = 1,
        param_dtype: DTypeLike = jnp.float32,
    ):
        require_positive_integers(size=size, groups=groups)
        if size % groups:
            raise ValueError(f"groups must divide size, got {groups} and {size}")
        require_positive_numbers(eps=eps)
        require_flags(zero_centered=zero_centered)
        require_dtypes(param_dtype=param_dtype)
        self.eps = eps
        self.zero_centered = zero_centered
        self.groups = groups
        if zero_centered:
            self.offset = nnx.Param(jnp.zeros((size,), param_dtype))
        else:
            self.scale = nnx.Param(jnp.ones((size,), param_dtype))

    def __call__(self, x: Float[Array, "*leading size"]) -> Float[Array, "*leading size"]:
        """Normalises x over its last axis and returns it in its own dtype.

        Raises:
            ValueError: x is of another size or not floating-point.
        """
        learned = self.offset if self.zero_centered else self.scale
        x = checked_array("x", x, {"...": None, "size": learned.shape[-1]})
        # Of the norm of a few tokens XLA makes six passes, each of which costs what one does.
        few = x.ndim == 3 and isinstance(x.shape[1], int) and x.shape[1] <= FEW_TOKENS
        if few and self.groups == 1 and device.platform() == "tpu" and shares(x.shape[0]):
            from pallas_kernels.tpu import gated_norm

            if gated_norm.unsupported(x.shape[2], x.shape[2], x.dtype) is None:
                run = partial(gated_norm.gated_norm, gate=None, eps=self.eps, keeps_nan=True)
                rows = ("batch", "time", None)
                y: Array = by_shares(run, (x, self.multiplier()), (rows, (None,)), rows)
                return y
        y, finite = self.normalised(x)
        return jnp.where(finite, y, jnp.asarray(jnp.nan, y.dtype))

    def normalised(
        self, x: Float[Array, "*leading size"]
    ) -> tuple[Float[Array, "*leading size"], Bool[Array, "*leading 1"]]:
        """What calling it does, and where x is finite; elsewhere entries may be zero, and nothing passes back."""
        parts = x if self.groups == 1 else x.reshape(*x.shape[:-1], self.groups, -1)
        normal, finite = normalised(parts, self.eps, jnp.mean)
        scale = self.multiplier(normal.dtype)
        y = (normal.reshape(x.shape) * scale.reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)
        return y, finite if self.groups == 1 else jnp.all(finite, axis=-2)

    def multiplier(self, dtype: DTypeLike = jnp.float32) -> Float[Array, " size"]:
        """What the normalised entries are multiplied with."""
        learned = (self.offset if self.zero_centered else self.scale)[...].astype(dtype)
        return 1.0 + learned if self.zero_centered else learned


def l2_normalize(
    x: Float[Array, "*leading size"], eps: float = EPS, *, implementation: str | None = None
) -> Float[Array, "*leading size"]:
    """Divides x by its length over the last axis: `y = x / sqrt(sum(x^2) + eps)`, in the dtype of x.

    Right for entries of any size, those whose squares float32 cannot hold too. Where an entry is not finite all of its
    axis is NaN, and its gradient zero by selection.

    Args:
        x: of at least one axis.
        eps: a positive number.
        implementation: "xla", "pallas" for the kernel on TPUs, which takes `[batch, time, heads, size]`, or None for that
            where it can run; it is differentiable in reverse mode only.

    Raises:
        ValueError: x has no axis or is not floating-point, or eps is not a positive number, or implementation cannot run.

    Examples:
        >>> l2_normalize(jnp.array([3.0, 4.0])).round(3).tolist() == jnp.array([0.6, 0.8]).tolist()
        True
    """
    require_positive_numbers(eps=eps)
    x = checked_array("x", x, {"...": None, "size": None})
    return unit_heads(x, eps, implementation)
