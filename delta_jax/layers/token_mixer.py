"""What a model asks of a layer that mixes tokens, whatever it is made of."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from delta_jax.ops.padding import to_front

__all__ = ["TokenMixer", "keep_rows"]


def keep_rows[Cache](cache: Cache, rows: Bool[Array, " batch"]) -> Cache:
    """A cache, any tree of arrays [B, ...], with zeros in the rows that are False."""

    def select(x: Array) -> Array:
        return jnp.where(rows.reshape((-1,) + (1,) * (x.ndim - 1)), x, jnp.zeros((), x.dtype))

    kept: Cache = jax.tree.map(select, cache)
    return kept


class TokenMixer(nnx.Module):
    """A causal map of sequences with a cache, an immutable tree of arrays with the method `keep(rows)`.

    Subclasses define `init_cache` and `with_cache`.
    """

    initializer_std: float
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    def init_cache(self, batch_size: int, *, length: int | None = None) -> Any:
        """The cache of `batch_size` sequences that have not begun.

        Args:
            batch_size: sequences.
            length: tokens that a sequence may have at most, for layers that keep every token; others ignore it.
        """
        raise NotImplementedError

    def check_room(self, cache: Any, tokens: int | Int[Array, " batch"]) -> None:
        """Raises a ValueError if the cache, or one of a stack of caches, is known to have no room for more tokens."""

    def with_cache(
        self,
        x: Float[Array, "batch time hidden"],
        segment_ids: Int[Array, "batch time"] | None,
        cache: Any,
        lengths: Int[Array, " batch"] | None = None,
    ) -> tuple[Float[Array, "batch time hidden"], Any]:
        """What calling the layer with return_cache=True does; of each row only the first `lengths` tokens are there."""
        raise NotImplementedError

    def __call__(
        self,
        x: Float[Array, "batch time hidden"],
        *,
        segment_ids: Int[Array, "batch time"] | None = None,
        mask: Bool[Array, "batch time"] | None = None,
        cache: Any = None,
        return_cache: bool = False,
    ) -> Float[Array, "batch time hidden"] | tuple[Float[Array, "batch time hidden"], Any]:
        """Mixes the tokens of every sequence causally.

        Args:
            x: [B, T, hidden_size].
            segment_ids: [B, T] integers; nothing passes from one segment to the next. None continues the
                segment of the cache (a new cache is in segment 0).
            mask: [B, T] bool, false where a token is padding, on either side or between; None is none. Outputs of real
                tokens and the new cache are those of the rows without padding, whatever it holds; its own outputs are
                zero. A row of padding alone leaves its cache as it is.
            cache: what a former call returned, or `init_cache`; None starts anew.
            return_cache: return the new cache as well, which is always done when a cache is given. Where every
                token is kept and no cache is given, the new one has room for these T tokens and no more.

        Returns:
            y [B, T, hidden_size] in the layer's dtype, or (y, cache).

        Raises:
            ValueError: the cache is known to have no room, or mask is not bool [B, T].
        """
        if mask is None:
            y, new_cache = self.with_cache(x, segment_ids, cache)
        else:
            front = to_front(mask, x.shape[:2])
            ids = None if segment_ids is None else front.move(segment_ids)
            y, new_cache = self.with_cache(front.move(x), ids, cache, front.lengths)
            y = front.back(y)
        return (y, new_cache) if return_cache or cache is not None else y

    def linear(self, inputs: int, outputs: int, rngs: nnx.Rngs, *, use_bias: bool = False) -> nnx.Linear:
        """A projection in the layer's dtypes; a bias begins at zero."""
        return nnx.Linear(
            inputs,
            outputs,
            use_bias=use_bias,
            kernel_init=nnx.initializers.normal(self.initializer_std),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            rngs=rngs,
        )
