"""The short convolution of a stream of q, k or v as a layer."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from delta_jax.layers.options import ACTIVATIONS
from delta_jax.layers.token_mixer import TokenMixer
from delta_jax.ops.short_convolution import short_convolution

__all__ = ["ShortConvolution"]


class ShortConvolution(nnx.Module):
    """The weights of `short_convolution`, and the activation that follows.

    Args:
        owner: the layer whose dtypes and initialisation it shares.
        size: width in tokens.
        channels: width of the stream.
        rngs: where the initial parameters come from.
        use_bias: whether there is a bias, which begins at zero.
        activation: a key of `ACTIVATIONS`.
    """

    def __init__(
        self,
        owner: TokenMixer,
        size: int,
        channels: int,
        rngs: nnx.Rngs,
        *,
        use_bias: bool = False,
        activation: str = "silu",
    ):
        normal = jax.random.normal(rngs.params(), (size, channels), owner.param_dtype)
        self.kernel = nnx.Param(owner.initializer_std * normal)
        if use_bias:
            self.bias = nnx.Param(jnp.zeros((channels,), owner.param_dtype))
        self.use_bias = use_bias
        self.activation = activation

    def __call__(
        self,
        x: Float[Array, "batch time channels"],
        segment_ids: Int[Array, "batch time"] | None,
        cache: Float[Array, "batch tail channels"] | None,
        lengths: Int[Array, " batch"] | None = None,
    ) -> tuple[Float[Array, "batch time channels"], Float[Array, "batch tail channels"]]:
        y, tail = short_convolution(x, self.kernel[...], segment_ids=segment_ids, cache=cache, lengths=lengths)
        if self.use_bias:
            y = y + self.bias[...].astype(y.dtype)[None, None]
        return ACTIVATIONS[self.activation](y), tail
