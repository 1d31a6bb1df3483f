"""The read-out of MAD's compression task: every position from the features of the last one."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from delta_jax.layers import RMSNorm
from delta_jax.models import LanguageModel

__all__ = ["Decoder"]


class Decoder(nnx.Module):
    """An encoder whose last features, with the code of a position added, say which token stood there.

        y_t = W_2 norm(gelu(W_1 (h_T + code_t) + b_1)) + b_2

    Args:
        model: the encoder; its head reads y.
        rngs: where the initial parameters come from.

    Source: Poli et al., "Mechanistic design and scaling of hybrid architectures", 2024 (arXiv 2403.17844) section 3.1.
    """

    def __init__(self, model: LanguageModel, *, rngs: nnx.Rngs):
        self.model = model
        size, normal = model.config.hidden_size, nnx.initializers.normal(model.config.initializer_std)
        self.hidden, self.output = (nnx.Linear(size, size, kernel_init=normal, rngs=rngs) for _ in range(2))
        self.norm = RMSNorm(size, eps=model.config.norm_eps)

    def features(self, tokens: Int[Array, "batch time"]) -> tuple[Float[Array, "batch time hidden"], Any]:
        """Called like `LanguageModel.features`, without a cache."""
        x, _ = self.model.features(tokens)
        x = x[:, -1:] + position_codes(*x.shape[1:])[None].astype(x.dtype)
        return self.output(self.norm(jax.nn.gelu(self.hidden(x)))), None

    def head(self, x: Float[Array, "*leading hidden"]) -> Float[Array, "*leading vocab"]:
        """The logits of the features x."""
        return self.model.head(x)


def position_codes(length: int, size: int) -> Array:
    """[length, size]: sines and cosines of the position at wavelengths from 2 pi to 2 pi * 10^4."""
    rates = 10000.0 ** (-np.arange(0, size, 2) / size)
    angles = np.arange(length)[:, None] * rates
    return jnp.asarray(np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(length, -1)[:, :size], jnp.float32)
