"""What softmax attention layers share: the cache of past tokens, and who sees whom in packed sequences."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from delta_jax.layers.token_mixer import Mixed, TokenMixer, keep_rows
from delta_jax.ops.arguments import require_count
from delta_jax.ops.attention import Places, places

__all__ = ["AttentionCache", "CachedAttention"]

NEVER = jnp.iinfo(jnp.int32).max


class AttentionCache(NamedTuple):
    """What attention keeps of the tokens of the current segment; position p lies in slot p % slots.

    Attributes:
        entries: what is kept of a token, such as its key and value, each [B, slots, ...].
        position: [B] int32, tokens of the segment so far.
        segment_id: [B] int32, the segment that the last token belonged to; 0 where no ids were given.
    """

    entries: tuple[Float[Array, "batch slots *rest"], ...]
    position: Int[Array, " batch"]
    segment_id: Int[Array, " batch"]

    def keep(self, rows: Bool[Array, " batch"]) -> "AttentionCache":
        """Forgets the past of the rows that are False."""
        return keep_rows(self, rows)

    def places(self) -> Places:
        """The places of what lies in the slots, relative to the token that comes next; empty slots are never seen."""
        slots = self.entries[0].shape[1]
        last = self.position[:, None] - 1
        position = last - (last - jnp.arange(slots, dtype=jnp.int32)[None]) % slots
        return Places(jnp.zeros_like(position), jnp.where(position < 0, NEVER, position))

    def write(self, entries: tuple[Array, ...], at: Places, segment_id: Int[Array, " batch"]) -> "AttentionCache":
        """The cache after a call: the last tokens of the last segment; those of any other are forgotten."""
        slots, last = self.entries[0].shape[1], at.position[:, -1:]
        old = self if entries[0].shape[1] == 1 else self.keep(at.run[:, -1] == 0)
        kept = (at.run == at.run[:, -1:]) & (at.position > last - slots)
        slot = jnp.where(kept, at.position % slots, slots)

        def put(buffer: Array, slot: Array, values: Array) -> Array:
            return buffer.at[slot].set(values, mode="drop")

        new = tuple(jax.vmap(put)(buffer, slot, values) for buffer, values in zip(old.entries, entries, strict=True))
        return AttentionCache(new, last[:, 0] + 1, segment_id)


class CachedAttention(TokenMixer):
    """A token mixer by softmax attention; subclasses say what is kept of a token and how it is attended to.

    Positions count from the beginning of a segment, and the cache holds tokens of the current segment only. With a
    window its size is the window's; without one it holds `length` tokens of a segment. A call that goes beyond is
    refused where that is known, outside `jit` and without segment ids; elsewhere its outputs beyond are NaN.
    """

    window: int | None

    @property
    def token_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of what is kept of a token."""
        raise NotImplementedError

    def project(
        self, x: Float[Array, "batch time hidden"], position: Int[Array, "batch time"]
    ) -> tuple[Float[Array, "batch time heads key"], tuple[Array, ...]]:
        """The queries, and what is kept of each token."""
        raise NotImplementedError

    def _mix(
        self,
        x: Float[Array, "batch time hidden"],
        q: Float[Array, "batch time heads key"],
        entries: tuple[Array, ...],
        places: tuple[Places, Places] | None,
    ) -> Float[Array, "batch time hidden"]:
        """The output, from the queries, the entries of all tokens and the places of both; None is one segment."""
        raise NotImplementedError

    def init_cache(self, batch_size: int, *, length: int | None = None) -> AttentionCache:
        """The cache of `batch_size` sequences that have not begun.

        Args:
            batch_size: sequences.
            length: tokens that a segment may have at most; needed without a window.

        Raises:
            ValueError: batch_size, or a length that is needed, is not a positive integer.
        """
        require_count("batch_size", batch_size)
        if self.window is None:
            require_count("length", length, ", since attention keeps every token")
        slots = length if self.window is None else self.window
        return AttentionCache(
            tuple(jnp.zeros((batch_size, slots, *shape), self.dtype) for shape in self.token_shapes),
            jnp.zeros((batch_size,), jnp.int32),
            jnp.zeros((batch_size,), jnp.int32),
        )

    def check_room(self, cache: AttentionCache, tokens: int) -> None:
        """Raises a ValueError if the cache is known to have no room for so many tokens more.

        Args:
            cache: one, or a stack of several along a leading axis.
            tokens: tokens of the next call, which continue the segment of the cache.
        """
        if self.window is not None:
            return
        slots = cache.entries[0].shape[cache.position.ndim]
        past = 0 if isinstance(cache.position, jax.core.Tracer) else int(jnp.max(cache.position))
        if past + tokens > slots:
            raise ValueError(
                f"cache has room for {slots} tokens of a segment and holds {past}, but {tokens} more are given; "
                f"make it with init_cache(length={past + tokens}) or more"
            )

    def with_cache(
        self,
        x: Float[Array, "batch time hidden"],
        segment_ids: Int[Array, "batch time"] | None,
        cache: AttentionCache | None,
    ) -> Mixed:
        """What calling the layer with return_cache=True does."""
        x = x.astype(self.dtype)
        batch, time = x.shape[:2]
        old = self.init_cache(batch, length=time) if cache is None else cache
        if segment_ids is not None:
            old = old.keep(segment_ids[:, 0] == old.segment_id)
        elif cache is not None:
            self.check_room(cache=old, tokens=time)
        ids = jnp.broadcast_to(old.segment_id[:, None], (batch, time)) if segment_ids is None else segment_ids
        here = places(ids, old.position)
        q, entries = self.project(x, here.position)
        new = old.write(entries, here, ids[:, -1].astype(jnp.int32))
        if cache is None:
            return Mixed(self._mix(x, q, entries, None if segment_ids is None else (here, here)), new)
        if time == 1:
            y = self._mix(x, q, new.entries, (here, new.places()))
        else:
            both = tuple(jnp.concatenate(pair, axis=1) for pair in zip(old.entries, entries, strict=True))
            there = Places(*(jnp.concatenate(pair, axis=1) for pair in zip(old.places(), here, strict=True)))
            y = self._mix(x, q, both, (here, there))
        if self.window is None:
            fits = here.position < new.entries[0].shape[1]
            y = jnp.where(fits[..., None], y, jnp.full((), jnp.nan, y.dtype))
        return Mixed(y, new)
