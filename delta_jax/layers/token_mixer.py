"""What a model asks of a layer that mixes tokens, whatever it is made of."""

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from delta_jax.layers.checks import require_cache
from delta_jax.layers.projection import project
from delta_jax.ops.arguments import checked_array
from delta_jax.ops.padding import to_front
from delta_jax.parallel import ParameterRule, by_compiler, spec_of

__all__ = ["Mixed", "TokenMixer", "keep_rows"]


class Mixed(NamedTuple):
    """A layer's output and its new cache: a pair whose parts have names, or `nnx.tabulate` could not print it."""

    y: Float[Array, "batch time hidden"]
    cache: Any


def keep_rows[Cache](cache: Cache, rows: Bool[Array, " batch"]) -> Cache:
    """A cache, any tree of arrays [B, ...], with zeros in the rows that are False."""

    def select(x: Array) -> Array:
        return jnp.where(rows.reshape((-1,) + (1,) * (x.ndim - 1)), x, jnp.zeros((), x.dtype))

    kept: Cache = jax.tree.map(select, cache)
    return kept


def checked_sequences(x: Any, segment_ids: Any, hidden_size: int) -> tuple[Array, Array | None]:
    """x [B, T, hidden_size] and, if there are any, its segment ids [B, T] as arrays, or a ValueError that names one."""
    x = checked_array("x", x, {"batch": None, "time": None, "hidden_size": hidden_size})
    if 0 in x.shape:
        raise ValueError(f"x must hold at least one token, got shape {x.shape}.")
    if segment_ids is None:
        return x, None
    batch, time, _ = x.shape
    return x, checked_array("segment_ids", segment_ids, {"batch": batch, "time": time}, "integers")


class TokenMixer(nnx.Module):
    """A causal map of sequences with a cache, an immutable tree of arrays with the method `keep(rows)`.

    Subclasses define `init_cache` and `with_cache`.

    Attributes:
        parameter_rules: for each parameter that `delta_jax.parallel.RULES` does not name, or that it should not decide,
            its path in this layer, such as "b_proj/kernel", and its `delta_jax.parallel.ParameterRule`.

    Examples:
        >>> all(issubclass(mixer, TokenMixer) for mixer in MIXERS.values())
        True
    """

    parameter_rules: ClassVar[Mapping[str, ParameterRule]] = {}

    hidden_size: int
    initializer_std: float
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    def init_cache(self, batch_size: int, *, length: int | None = None) -> Any:
        """The cache of `batch_size` sequences that have not begun.

        Args:
            batch_size: sequences.
            length: tokens that a sequence may have at most, for layers that keep every token; others ignore it.

        Raises:
            ValueError: batch_size, or a length that is needed, is not a positive integer.
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
    ) -> Mixed:
        """What calling the layer with return_cache=True does; of each row only the first `lengths` tokens are there."""
        raise NotImplementedError

    def cache_of_layer(self, caches: Any, layer: Int[Array, ""]) -> Any:
        """From the caches of several such layers, arrays [L, B, ...], that of one, for `with_cache` of a few tokens."""
        # Taken out before anything else: were parts still read where all lie when the new ones are put there, XLA would copy
        # the caches of all layers first.
        return jax.lax.optimization_barrier(
            jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False), caches)
        )

    def with_cache_of_layer(self, caches: Any, layer: Int[Array, ""], cache: Any) -> Any:
        """The caches of several such layers with the new one of one, as `with_cache` returns it, in its place."""
        return jax.tree.map(lambda x, new: jax.lax.dynamic_update_index_in_dim(x, new, layer, 0), caches, cache)

    def __call__(
        self,
        x: Float[Array, "batch time hidden"],
        *,
        segment_ids: Int[Array, "batch time"] | None = None,
        mask: Bool[Array, "batch time"] | None = None,
        cache: Any = None,
        return_cache: bool = False,
    ) -> Float[Array, "batch time hidden"] | Mixed:
        """Mixes the tokens of every sequence causally.

        Args:
            x: [B, T, hidden_size], floating-point; arrays of NumPy are taken, lists are not.
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
            ValueError: x, segment_ids or mask do not have that shape or kind, or the cache is another layer's, one of
                another batch size, or known to have no room; the sentence names the argument.
        """
        x, segment_ids = checked_sequences(x, segment_ids, self.hidden_size)
        if cache is not None:
            require_cache(cache, x.shape[0], self.init_cache)
        cut = spec_of(x)
        specs: Any = {"y": cut, "cache": PartitionSpec(cut[0])}
        mixed = by_compiler(_mix, (self, x, segment_ids, mask, cache), Mixed(**specs))
        return mixed if return_cache or cache is not None else mixed.y

    def linear(self, inputs: int, outputs: int, rngs: nnx.Rngs, *, use_bias: bool = False) -> nnx.Linear:
        """A projection in the layer's dtypes; a bias begins at zero."""
        return nnx.Linear(
            inputs,
            outputs,
            use_bias=use_bias,
            kernel_init=nnx.initializers.normal(self.initializer_std),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            dot_general=project,
            rngs=rngs,
        )


def _mix(layer: TokenMixer, x: Array, segment_ids: Array | None, mask: Array | None, cache: Any) -> Mixed:
    if mask is None:
        return layer.with_cache(x, segment_ids=segment_ids, cache=cache)
    front = to_front(mask, x.shape[:2])
    ids = None if segment_ids is None else front.move(segment_ids)
    y, cache = layer.with_cache(front.move(x), segment_ids=ids, cache=cache, lengths=front.lengths)
    return Mixed(front.back(y), cache)
