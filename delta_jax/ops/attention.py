"""Softmax attention over packed sequences: positions inside segments, rotary embedding, and the masks."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from delta_jax.ops.arguments import attention_arguments, checked_array

__all__ = ["Places", "attend", "places", "rotate", "visible"]


class Places(NamedTuple):
    """Where tokens stand.

    Attributes:
        run: [B, T] int32, the stretch of equal segment ids that a token is in, counted from the first token.
        position: [B, T] int32, tokens of its segment before it.
    """

    run: Int[Array, "batch time"]
    position: Int[Array, "batch time"]


def places(segment_ids: Int[Array, "batch time"], past: Int[Array, " batch"] | None = None) -> Places:
    """Counts runs and positions; the first run continues a segment of which `past` tokens [B] have been seen."""
    segment_ids = checked_array("segment_ids", segment_ids, {"batch": None, "time": None}, "integers")
    if past is not None:
        past = checked_array("past", past, {"batch": segment_ids.shape[0]}, "integers")
    index = jnp.broadcast_to(jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None], segment_ids.shape)
    begins = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
    run = jnp.cumsum(begins, axis=1, dtype=jnp.int32)
    position = index - jax.lax.cummax(jnp.where(begins, index, 0), axis=1)
    if past is not None:
        position = position + jnp.where(run == 0, past[:, None], 0)
    return Places(run, position)


def rotate(
    x: Float[Array, "batch time heads channels"],
    position: Int[Array, "batch time"],
    *,
    theta: float,
    channels: int,
) -> Float[Array, "batch time heads channels"]:
    """Rotary position embedding of the first `channels` channels, an even number; the others pass as they are.

    Channel i of the first half and channel i of the second half are turned together by the angle
    `position * theta^(-2i / channels)`, computed in float32.

    Raises:
        ValueError: an array or number does not fit; the sentence names it.

    Source: Su et al., "RoFormer", 2021, section 3.4.2, with the pairs of GPT-NeoX.
    """
    x = checked_array("x", x, dict.fromkeys(("batch", "time", "heads", "channels")))
    position = checked_array("position", position, {"batch": x.shape[0], "time": x.shape[1]}, "integers")
    if not isinstance(channels, int) or channels % 2 or not 0 <= channels <= x.shape[3]:
        raise ValueError(f"channels must be an even number of the {x.shape[3]} channels of x, got {channels!r}.")
    if not isinstance(theta, int | float) or isinstance(theta, bool) or not theta > 0:
        raise ValueError(f"theta must be a positive number, got {theta!r}.")
    if channels == 0:
        return x
    frequency = theta ** (-jnp.arange(0, channels, 2, dtype=jnp.float32) / channels)
    angle = position[..., None, None].astype(jnp.float32) * frequency[None, None, None]
    cosine, sine = jnp.cos(angle), jnp.sin(angle)
    one, other = jnp.split(x[..., :channels].astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([one * cosine - other * sine, other * cosine + one * sine], axis=-1)
    return jnp.concatenate([turned.astype(x.dtype), x[..., channels:]], axis=-1)


def visible(queries: Places, keys: Places, window: int | None) -> Bool[Array, "batch 1 time keys"]:
    """Which keys each query attends to: of its segment, not later, and among the last `window` tokens."""
    distance = queries.position[:, :, None] - keys.position[:, None, :]
    mask = (queries.run[:, :, None] == keys.run[:, None, :]) & (distance >= 0)
    if window is not None:
        mask = mask & (distance < window)
    return mask[:, None]


def attend(
    q: Float[Array, "batch time heads key"],
    k: Float[Array, "batch keys kv_heads key"],
    v: Float[Array, "batch keys kv_heads value"],
    *,
    scale: float | Float[Array, ""],
    window: int | None = None,
    places: tuple[Places, Places] | None = None,
    implementation: Any = None,
    block: int = 1024,
) -> Float[Array, "batch time heads value"]:
    """Softmax attention by `jax.nn.dot_product_attention`, the softmax in float32.

    Queries go block by block, at most 16 of them, each to the keys that it may see; the backward pass computes scores
    again. Memory then grows with T, not with T^2, and a window makes the cost grow with T too.

    Args:
        q: [B, T, H, K].
        k, v: [B, S, Hkv, K] and [B, S, Hkv, V] with V <= K; H is a multiple of Hkv. The last T are the queries' own.
        scale: of the products q k^T, a number or an array of no axes, which may be traced or learned.
        window: how many tokens a query sees, itself included; None is all.
        places: those of the queries and of the keys; None is one segment and S = T.
        implementation: None, "xla" or "cudnn"; the latter takes all queries at once.
        block: queries of a block, at least.

    Returns:
        [B, T, H, V].

    Raises:
        ValueError: an argument does not fit; the sentence names it.
    """
    q, k, v, scale = attention_arguments(q, k, v, scale=scale, window=window, places=places)
    time, past = q.shape[1], k.shape[1] - q.shape[1]
    size = max(block, -(-time // 16)) if isinstance(time, int) else time  # a symbolic time is one block
    if time <= size or implementation == "cudnn":
        mask = None if places is None else visible(*places, window)
        return _attend(q, k, v, mask, scale=scale, window=window, implementation=implementation)
    if places is None:
        index = jnp.arange(time, dtype=jnp.int32)[None]
        places = (Places(jnp.zeros_like(index), index),) * 2

    def of_block(start: int) -> Array:
        first = 0 if window is None or past else max(0, start - window + 1)
        queries, keys = slice(start, start + size), slice(first, past + start + size)
        mask = visible(Places(*(x[:, queries] for x in places[0])), Places(*(x[:, keys] for x in places[1])), window)
        again = jax.checkpoint(partial(_attend, scale=scale, window=None, implementation=implementation))
        part: Array = again(q[:, queries], k[:, keys], v[:, keys], mask)
        return part

    return jnp.concatenate([of_block(start) for start in range(0, time, size)], axis=1)


def _attend(
    q: Array, k: Array, v: Array, mask: Array | None, *, scale: float, window: int | None, implementation: Any
) -> Array:
    """Attention of all queries at once; without a mask it is causal, in the window."""
    size, dtype = v.shape[-1], v.dtype
    if dtype == jnp.float16:  # for which the library asks for products that CPUs and TPUs do not have
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    if size < k.shape[-1]:  # the library wants values of the size of keys
        v = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, k.shape[-1] - size)))
    seen: dict[str, Any] = {"mask": mask}
    if mask is None:
        seen = {"is_causal": True, "local_window_size": None if window is None else (window - 1, 0)}
    with jax.numpy_dtype_promotion("standard"):  # the library relies on it for types below float32
        o: Array = jax.nn.dot_product_attention(q, k, v, scale=scale, implementation=implementation, **seen)
    return o[..., :size].astype(dtype)
