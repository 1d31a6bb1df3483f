"""What a mixer on the delta rule remembers of the past."""

from typing import NamedTuple

import jax
from jaxtyping import Array, Bool, Float, Int

from delta_jax.layers.token_mixer import keep_rows

__all__ = ["MixerCache", "OfLayer"]


class OfLayer(NamedTuple):
    """An array of one layer where it lies, among those of all: a step reads and writes it in place.

    Attributes:
        stack: [L, B, ...].
        layer: [] int32, which it is.
    """

    stack: Float[Array, "layers batch *rest"]
    layer: Int[Array, ""]

    def taken(self) -> Float[Array, "batch *rest"]:
        """The array by itself."""
        return jax.lax.dynamic_index_in_dim(self.stack, self.layer, keepdims=False)

    def put(self, new: Float[Array, "batch *rest"]) -> "OfLayer":
        """All of them, with another in the place of this one."""
        return OfLayer(jax.lax.dynamic_update_index_in_dim(self.stack, new, self.layer, 0), self.layer)


class MixerCache(NamedTuple):
    """All a mixer remembers of the past; its size does not depend on how long that past is.

    Attributes:
        convolution: the tails of the q, k and v convolutions, each [B, conv_size - 1, channels], or ().
        state: [B, Hv, K, V] float32. This and the tails lie among those of all layers while a model reads a few tokens.
        segment_id: [B] int32, the segment that the last token belonged to; 0 where no ids were given.
        position: [B] int32, tokens of that segment so far.

    Examples:
        >>> layer = DeltaNet(16, num_heads=2, rngs=nnx.Rngs(0))
        >>> cache = layer.init_cache(batch_size=2)
        >>> isinstance(cache, MixerCache), [tail.shape for tail in cache.convolution]
        (True, [(2, 3, 16), (2, 3, 16), (2, 3, 16)])
    """

    convolution: tuple[Float[Array, "batch tail channels"] | OfLayer, ...]
    state: Float[Array, "batch v_heads key value"] | OfLayer
    segment_id: Int[Array, " batch"]
    position: Int[Array, " batch"]

    def keep(self, rows: Bool[Array, " batch"]) -> "MixerCache":
        """Forgets the past of the rows that are False."""
        return keep_rows(self, rows)
