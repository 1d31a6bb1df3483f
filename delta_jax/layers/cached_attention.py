"""What softmax attention layers share: the cache of past tokens, and who sees whom in packed sequences."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from delta_jax.layers.contained import contained
from delta_jax.layers.token_mixer import Mixed, TokenMixer, keep_rows
from delta_jax.ops.arguments import require_count
from delta_jax.ops.padding import at_last, filled_ids, first_tokens, select_tokens
from delta_jax.ops.segments import Positions, positions

__all__ = ["AttentionCache", "CachedAttention"]

NEVER = jnp.iinfo(jnp.int32).max


class AttentionCache(NamedTuple):
    """What attention keeps of the tokens of the current segment; position p lies in slot p % slots.

    Attributes:
        entries: what is kept of a token, such as its key and value, each [B, slots, ...].
        position: [B] int32, tokens of the segment so far.
        segment_id: [B] int32, the segment that the last token belonged to; 0 where no ids were given.

    Examples:
        >>> layer = Attention(16, num_heads=2, rngs=nnx.Rngs(0))
        >>> cache = layer.init_cache(batch_size=2, length=7)
        >>> [entry.shape for entry in cache.entries], cache.position.tolist()
        ([(2, 7, 2, 8), (2, 7, 2, 8)], [0, 0])
    """

    entries: tuple[Float[Array, "batch slots *rest"], ...]
    position: Int[Array, " batch"]
    segment_id: Int[Array, " batch"]

    def keep(self, rows: Bool[Array, " batch"]) -> "AttentionCache":
        """Forgets the past of the rows that are False."""
        return keep_rows(self, rows)

    def positions(self) -> Positions:
        """The positions of what lies in the slots, relative to the token that comes next; empty slots are never seen."""
        slots = self.entries[0].shape[1]
        last = self.position[:, None] - 1
        position = last - (last - jnp.arange(slots, dtype=jnp.int32)[None]) % slots
        return Positions(jnp.zeros_like(position), jnp.where(position < 0, NEVER, position))

    def write(
        self,
        entries: tuple[Array, ...],
        at: Positions,
        segment_id: Int[Array, " batch"],
        lengths: Int[Array, " batch"] | None = None,
    ) -> "AttentionCache":
        """The cache after a call: the last tokens of the last segment; those of any other are forgotten.

        Of each row only the first `lengths` tokens are there.
        """
        slots, time = self.entries[0].shape[1], entries[0].shape[1]
        last = at_last(lengths, at.position, self.position - 1)[:, None]
        current = at_last(lengths, at.segment, jnp.zeros_like(self.position))[:, None]
        old = self if time == 1 else self.keep(current[:, 0] == 0)
        kept = (at.segment == current) & (at.position > last - slots)
        if lengths is not None:
            kept = kept & first_tokens(lengths, time)
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

    Examples:
        >>> issubclass(Attention, CachedAttention) and issubclass(LatentAttention, CachedAttention)
        True
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
        positions: tuple[Positions, Positions] | None,
    ) -> Float[Array, "batch time hidden"]:
        """The output, from the queries, the entries of all tokens and the positions of both; None is one segment."""
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

    def check_room(self, cache: AttentionCache, tokens: int | Int[Array, " batch"]) -> None:
        """Raises a ValueError if the cache is known to have no room for so many tokens more.

        Args:
            cache: one, or a stack of several along a leading axis.
            tokens: tokens of the next call, which continue the segment of the cache; of all rows, or of each.
        """
        if self.window is not None:
            return
        slots = cache.entries[0].shape[cache.position.ndim]
        past, more = (0 if isinstance(x, jax.core.Tracer) else np.asarray(x) for x in (cache.position, tokens))
        row = np.unravel_index(np.argmax(past + more), np.shape(past + more))
        past, more = (int(np.broadcast_to(x, np.shape(past + more))[row]) for x in (past, more))
        if past + more > slots:
            raise ValueError(
                f"cache has room for {slots} tokens of a segment and holds {past}, but {more} more are given; "
                f"make it with init_cache(length={past + more}) or more"
            )

    def with_cache(
        self,
        x: Float[Array, "batch time hidden"],
        segment_ids: Int[Array, "batch time"] | None,
        cache: AttentionCache | None,
        lengths: Int[Array, " batch"] | None = None,
    ) -> Mixed:
        """What calling the layer with return_cache=True does; of each row only the first `lengths` tokens are there."""
        x = x.astype(self.dtype)
        batch, time = x.shape[:2]
        old = self.init_cache(batch, length=time) if cache is None else cache
        real = None if lengths is None else first_tokens(lengths, time)
        if real is not None:
            x = select_tokens(real, x)
        if segment_ids is not None:
            ids = filled_ids(segment_ids, lengths, old.segment_id)
            old = old.keep(ids[:, 0] == old.segment_id)
        else:
            ids = jnp.broadcast_to(old.segment_id[:, None], (batch, time))
            if cache is not None:
                self.check_room(cache=old, tokens=time if lengths is None else lengths)
        here = positions(ids, old.position)
        q, entries = contained(lambda x: self.project(x, here.position), x)
        new = old.write(entries, here, ids[:, -1].astype(jnp.int32), lengths)
        if cache is None:  # padding comes last: whoever sees it is padding
            y = self._mix(x, q, entries, None if segment_ids is None else (here, here))
        elif time == 1:
            y = self._mix(x, q, new.entries, (here, new.positions()))
        else:
            both = tuple(jnp.concatenate(pair, axis=1) for pair in zip(old.entries, entries, strict=True))
            there = Positions(*(jnp.concatenate(pair, axis=1) for pair in zip(old.positions(), here, strict=True)))
            y = self._mix(x, q, both, (here, there))
        if self.window is None and cache is not None:
            fits = here.position < new.entries[0].shape[1]
            y = jnp.where(fits[..., None], y, jnp.full((), jnp.nan, y.dtype))
        return Mixed(y if real is None else select_tokens(real, y), new)
