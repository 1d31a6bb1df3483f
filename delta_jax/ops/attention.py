"""Softmax attention over packed sequences: positions inside segments, rotary embedding, and the masks."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

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

    Source: Su et al., "RoFormer", 2021, section 3.4.2, with the pairs of GPT-NeoX.
    """
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
    scale: float,
    window: int | None = None,
    mask: Bool[Array, "batch 1 time keys"] | None = None,
    implementation: Any = None,
) -> Float[Array, "batch time heads value"]:
    """Softmax attention by `jax.nn.dot_product_attention`, the softmax in float32.

    Args:
        q: [B, T, H, K].
        k, v: [B, S, Hkv, K] and [B, S, Hkv, V] with V <= K; H is a multiple of Hkv.
        scale: of the products q k^T.
        window: without a mask, how many tokens a query sees, itself included; None is all.
        mask: True where a query sees a key; None is causal, with S = T.
        implementation: None, "xla" or "cudnn".

    Returns:
        [B, T, H, V].
    """
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
