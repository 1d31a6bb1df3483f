"""What a model asks of a layer that mixes tokens, whatever it is made of."""

from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from delta_jax.parallel import ParameterRule

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

    Attributes:
        parameter_rules: for each parameter that `delta_jax.parallel.RULES` does not name, or that it should not decide,
            its path in this layer, such as "b_proj/kernel", and its `delta_jax.parallel.ParameterRule`.
    """

    parameter_rules: ClassVar[Mapping[str, ParameterRule]] = {}

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

    def check_room(self, cache: Any, tokens: int) -> None:
        """Raises a ValueError if the cache, or one of a stack of caches, is known to have no room for more tokens."""

    def with_cache(
        self, x: Float[Array, "batch time hidden"], segment_ids: Int[Array, "batch time"] | None, cache: Any
    ) -> tuple[Float[Array, "batch time hidden"], Any]:
        """What calling the layer with return_cache=True does."""
        raise NotImplementedError

    def __call__(
        self,
        x: Float[Array, "batch time hidden"],
        *,
        segment_ids: Int[Array, "batch time"] | None = None,
        cache: Any = None,
        return_cache: bool = False,
    ) -> Float[Array, "batch time hidden"] | tuple[Float[Array, "batch time hidden"], Any]:
        """Mixes the tokens of every sequence causally.

        Args:
            x: [B, T, hidden_size].
            segment_ids: [B, T] integers; nothing passes from one segment to the next. None continues the
                segment of the cache (a new cache is in segment 0).
            cache: what a former call returned, or `init_cache`; None starts anew.
            return_cache: return the new cache as well, which is always done when a cache is given. Where every
                token is kept and no cache is given, the new one has room for these T tokens and no more.

        Returns:
            y [B, T, hidden_size] in the layer's dtype, or (y, cache).

        Raises:
            ValueError: the cache is known to have no room.
        """
        y, new_cache = self.with_cache(x, segment_ids, cache)
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
