"""The weights of a model as its products use them."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx

from delta_jax.layers import MixtureOfExperts
from delta_jax.models import LanguageModel

__all__ = ["in_compute_dtype"]


def in_compute_dtype(model: LanguageModel) -> LanguageModel:
    """The model with the weights of projections, experts and embedding in the narrower dtype they are cast to in every call.

    What it computes is the same bit for bit; a loop over tokens need not cast them again. A model of which no weight is
    wider than it computes is returned as it is; of any other, what stays the same is shared with the one given.

    Examples:
        >>> mixer = MixerSpec(mixer="delta_net", options=(("num_heads", 2),))
        >>> config = ModelConfig(vocab_size=11, hidden_size=8, num_layers=1, pattern=(mixer,), intermediate_size=0)
        >>> model = LanguageModel(config, rngs=nnx.Rngs(0))
        >>> in_compute_dtype(model) is model  # it computes in float32
        True
    """
    return _cast(model) if any(True for _ in _wide(model)) else model


@jax.jit
def _cast(model: LanguageModel) -> LanguageModel:
    for weight, dtype in list(_wide(model)):
        weight.set_value(weight[...].astype(dtype))
    return model


def _wide(model: LanguageModel) -> Iterator[tuple[nnx.Param, jnp.dtype]]:
    """The weights that are wider than the dtype they are cast to before anything is done with them, and that dtype."""
    for _, part in nnx.iter_modules(model):
        weights: list[nnx.Param | None] = []
        if isinstance(part, nnx.Linear):
            weights, dtype = [part.kernel, part.bias], part.dtype
        elif isinstance(part, nnx.Embed):
            weights, dtype = [part.embedding], part.dtype
        elif isinstance(part, MixtureOfExperts):
            weights, dtype = list(part.experts.values()), part.dtype
        for weight in weights:
            if weight is not None and dtype is not None:
                narrow = jnp.dtype(dtype)
                if narrow.itemsize < weight[...].dtype.itemsize:
                    yield weight, narrow
