"""Segments of packed sequences: where they start, where their tokens stand, and the final state of each.

A segment is a stretch of equal ids: an id that comes back later is another segment.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from delta_jax.ops.arguments import checked_array, require_count
from delta_jax.ops.padding import skip_tokens
from delta_jax.ops.partition import by_parts

__all__ = ["Positions", "positions", "segment_starts", "segment_states"]


class Positions(NamedTuple):
    """Where tokens stand.

    Attributes:
        segment: [B, T] int32, which of the row's segments a token is in, the first is 0.
        position: [B, T] int32, tokens of its segment before it.
    """

    segment: Int[Array, "batch time"]
    position: Int[Array, "batch time"]


def segment_starts(segment_ids: Int[Array, "batch time"]) -> Bool[Array, "batch time"]:
    """Where another segment starts than that of the token before; false for the first token, which may continue one."""
    return jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))


def segment_numbers(segment_ids: Int[Array, "batch time"]) -> Int[Array, "batch time"]:
    """Which of the row's segments each token is in, the first is 0."""
    return jnp.cumsum(segment_starts(segment_ids), axis=1, dtype=jnp.int32)


def positions(segment_ids: Int[Array, "batch time"], past: Int[Array, " batch"] | None = None) -> Positions:
    """Counts segments and positions; the first segment continues one of which `past` tokens [B] have been seen."""
    segment_ids = checked_array("segment_ids", segment_ids, {"batch": None, "time": None}, "integers")
    if past is not None:
        past = checked_array("past", past, {"batch": segment_ids.shape[0]}, "integers")
    index = jnp.broadcast_to(jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None], segment_ids.shape)
    segment = segment_numbers(segment_ids)
    position = index - jax.lax.cummax(jnp.where(segment_starts(segment_ids), index, 0), axis=1)
    if past is not None:
        position = position + jnp.where(segment == 0, past[:, None], 0)
    return Positions(segment, position)


def segment_states(
    op: Callable[..., tuple[Array, Array]],
    *,
    segment_ids: Int[Array, "batch time"],
    max_segments: int,
    max_length: int | None = None,
    initial_state: Float[Array, "batch heads key value"] | None = None,
    **inputs: Any,
) -> tuple[Float[Array, "batch time heads value"], Float[Array, "batch segments heads key value"]]:
    """An op on packed sequences that returns the final state of every segment, not only of the last.

        o, states = segment_states(delta_rule, q=q, k=k, v=v, beta=beta, g=g, segment_ids=ids, max_segments=4)

    Every segment becomes a row of `max_length` tokens of its own, filled up with neutral ones (`skip_tokens`), so the op
    runs on `batch * max_segments` rows and nothing passes between them.
    Differentiable; works for every member and implementation.

    Args:
        op: `delta_rule`, `delta_product` or `linear_attention`, or one of them with its other options bound by
            `functools.partial`.
        segment_ids: [B, T] integers.
        max_segments: how many segments a row has at most; the shape of the result must be known.
        max_length: how many tokens a segment has at most; None is T. The less, the less work.
        initial_state: [B, H, K, V]; belongs to the first segment of each row.
        inputs: the op's q, k, v, beta, g and erase, as far as they are there, by name.

    Returns:
        o [B, T, H, V], that of `op(segment_ids=segment_ids)`, and the states [B, max_segments, H, K, V] after the last
        token of each segment, zeros for segments that a row does not have. If a row has more segments or longer ones than
        was said, and that is not known because the ids are traced, outputs and states of what does not fit are NaN.

    Raises:
        ValueError: a limit is not a positive integer, or is known to be exceeded.

    Examples:
        >>> x, ids = jnp.ones((1, 4, 1, 2)) / 2**0.5, jnp.array([[1, 1, 2, 2]])
        >>> o, states = segment_states(delta_rule, q=x, k=x, v=x, segment_ids=ids, max_segments=2)
        >>> states.shape, bool(jnp.allclose(states[:, 0], states[:, 1], atol=1e-6))
        ((1, 2, 1, 2, 2), True)
    """
    time = segment_ids.shape[1]
    max_length = time if max_length is None else max_length
    for name, limit in {"max_segments": max_segments, "max_length": max_length}.items():
        require_count(name, limit)
    segment, position = positions(segment_ids)
    _check_limit("max_segments", max_segments, "segments in a row", segment)
    _check_limit("max_length", max_length, "tokens in a segment", position)

    names = tuple(name for name, x in inputs.items() if x is not None)

    def separate(segment_ids: Array, initial_state: Array | None, *arrays: Array) -> tuple[Array, Array]:
        given = dict(zip(names, arrays, strict=True))
        return _separate(op, segment_ids, max_segments, max_length, initial_state, given)

    arrays = tuple(inputs[name] for name in names)
    by_token, of_state = ("batch", None), ("batch", None, "heads", None, None)
    # Keys, values and erase keys may have an axis of writes, so heads are found from the other side.
    after_heads = {"beta": 0, "g": inputs["g"].ndim - 3 if inputs.get("g") is not None else 0}
    axes = tuple(
        (*by_token, *(None,) * (x.ndim - 3 - after_heads.get(name, 1)), "heads", *(None,) * after_heads.get(name, 1))
        for name, x in zip(names, arrays, strict=True)
    )
    state_axes = ("batch", "heads", None, None)
    results = (*by_token, "heads", None), of_state
    states: tuple[Array, Array] = by_parts(
        separate, (segment_ids, initial_state, *arrays), (by_token, state_axes, *axes), results, kernels=True
    )
    return states


def _separate(
    op: Callable[..., tuple[Array, Array]],
    segment_ids: Array,
    max_segments: int,
    max_length: int,
    initial_state: Array | None,
    inputs: dict[str, Array],
) -> tuple[Array, Array]:
    batch, time = segment_ids.shape
    segment, position = positions(segment_ids)
    lengths = jnp.sum(segment[:, None] == jnp.arange(max_segments)[None, :, None], axis=-1, dtype=jnp.int32)
    starts = jnp.cumsum(lengths, axis=1) - lengths
    token = jnp.arange(max_length, dtype=jnp.int32)[None, None]
    index = jnp.minimum(starts[..., None] + token, time - 1).reshape(batch, -1)
    mask = (token < lengths[..., None]).reshape(batch * max_segments, max_length)

    def unpack(x: Array) -> Array:
        taken = jnp.take_along_axis(x, index.reshape(index.shape + (1,) * (x.ndim - 2)), axis=1)
        return taken.reshape(*mask.shape, *x.shape[2:])

    given = skip_tokens(mask, **{name: unpack(x) for name, x in inputs.items()})
    if initial_state is not None:
        later = ((0, 0), (0, max_segments - 1), (0, 0), (0, 0), (0, 0))
        given["initial_state"] = jnp.pad(initial_state[:, None], later).reshape(-1, *initial_state.shape[1:])
    padded, states = op(**given)
    states = states.reshape(batch, max_segments, *states.shape[1:])
    states = jnp.where((lengths > max_length)[..., None, None, None], jnp.nan, states)

    fits = (segment < max_segments) & (position < max_length)
    index = jnp.where(fits, segment * max_length + position, 0)[..., None, None]
    o = jnp.take_along_axis(padded.reshape(batch, -1, *padded.shape[2:]), index, axis=1)
    return jnp.where(fits[..., None, None], o, jnp.full((), jnp.nan, o.dtype)), states


def _check_limit(name: str, limit: int, what: str, count: Array) -> None:
    """Raises a ValueError if the largest of some counts from zero is known to exceed a limit."""
    if not isinstance(count, jax.core.Tracer) and int(count.max()) >= limit:
        raise ValueError(f"{name} must be at least {int(count.max()) + 1}, as there are so many {what}, got {limit}")
