"""Softmax attention over packed sequences: positions inside segments, rotary embedding, and the masks."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from delta_jax.ops import device
from delta_jax.ops.arguments import attention_arguments, checked_array, require_count
from delta_jax.ops.partition import Axes, by_parts
from delta_jax.ops.precision import accumulator_dtype
from delta_jax.ops.segments import Positions

__all__ = ["attend", "require_attention", "rotate", "visible"]


def rotate(
    x: Float[Array, "batch time heads channels"],
    position: Int[Array, "batch time"],
    *,
    theta: float,
    channels: int,
    interleaved: bool = False,
    factors: Float[Array, " pairs"] | None = None,
    amplitude: float = 1.0,
) -> Float[Array, "batch time heads channels"]:
    """Rotary position embedding of the first `channels` channels, an even number; the others pass as they are.

    Channel i of the first half and channel i of the second half are turned together by the angle
    `position * theta^(-2i / channels)`, computed in float32.

    Args:
        x: [B, T, H, C].
        position: [B, T] integers.
        theta: the base of the wave lengths.
        channels: how many channels are turned.
        interleaved: turns channels 2i and 2i + 1 together instead.
        factors: [channels / 2], multiply the angles of the pairs; None is one.
        amplitude: multiplies what is turned.

    Raises:
        ValueError: an array or number does not fit; the sentence names it.

    Source: Su et al., "RoFormer", 2021, section 3.4.2, whose pairs are interleaved; the halves are GPT-NeoX's.
    """
    x = checked_array("x", x, dict.fromkeys(("batch", "time", "heads", "channels")))
    position = checked_array("position", position, {"batch": x.shape[0], "time": x.shape[1]}, "integers")
    if not isinstance(channels, int) or isinstance(channels, bool) or channels % 2 or not 0 <= channels <= x.shape[3]:
        raise ValueError(f"channels must be an even number of the {x.shape[3]} channels of x, got {channels!r}.")
    if not isinstance(theta, int | float) or isinstance(theta, bool) or not 0 < theta < math.inf:
        raise ValueError(f"theta must be a positive number, got {theta!r}.")
    if channels == 0:
        return x
    frequency = theta ** (-jnp.arange(0, channels, 2, dtype=jnp.float32) / channels)
    if factors is not None:
        frequency = frequency * checked_array("factors", factors, {"pairs": channels // 2}).astype(jnp.float32)
    angle = position[..., None, None].astype(jnp.float32) * frequency[None, None, None]
    cosine, sine = jnp.cos(angle), jnp.sin(angle)
    if amplitude != 1.0:
        cosine, sine = amplitude * cosine, amplitude * sine
    wide = x[..., :channels].astype(jnp.float32)
    one, other = (wide[..., ::2], wide[..., 1::2]) if interleaved else jnp.split(wide, 2, axis=-1)
    pairs = one * cosine - other * sine, other * cosine + one * sine
    turned = jnp.stack(pairs, axis=-1).reshape(wide.shape) if interleaved else jnp.concatenate(pairs, axis=-1)
    return jnp.concatenate([turned.astype(x.dtype), x[..., channels:]], axis=-1)


def visible(queries: Positions, keys: Positions, window: int | None) -> Bool[Array, "batch 1 time keys"]:
    """Which keys each query attends to: of its segment, not later, and among the last `window` tokens."""
    distance = queries.position[:, :, None] - keys.position[:, None, :]
    mask = (queries.segment[:, :, None] == keys.segment[:, None, :]) & (distance >= 0)
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
    positions: tuple[Positions, Positions] | None = None,
    implementation: str | None = None,
    block: int = 1024,
) -> Float[Array, "batch time heads value"]:
    """Softmax attention; scores, softmax and sums in float32.

    Queries go block by block, at most 16 of them, each to the keys that it may see; the backward pass computes scores
    again. Memory then grows with T, not with T^2, and a window makes the cost grow with T too.

    Masks are selections: a key that a query does not see cannot reach its output, nor a gradient, whatever it holds, NaN
    and infinity too. A query that sees a key or value that is not finite, that is not finite itself, or whose product
    with a key it sees overflows, gives NaN in all channels, and has no gradient. A query that sees no key gives zeros.

    Args:
        q: [B, T, H, K].
        k, v: [B, S, Hkv, K] and [B, S, Hkv, V] with V <= K; H is a multiple of Hkv. The last T are the queries' own.
        scale: of the products q k^T, a number or an array of no axes, which may be traced or learned.
        window: how many tokens a query sees, itself included; None is all.
        positions: those of the queries and of the keys; None is one segment and S = T.
        implementation: None or "xla"; or "cudnn", that of `jax.nn.dot_product_attention`, which takes all queries at once,
            bfloat16 or float16, on NVIDIA GPUs. Products that overflow are then its own affair.
        block: queries of a block, at least.

    Returns:
        [B, T, H, V].

    Raises:
        ValueError: an argument does not fit; the sentence names it.
    """
    q, k, v, scale = attention_arguments(q, k, v, scale=scale, window=window, positions=positions)
    require_attention(implementation, q)
    require_count("block", block)
    given = (None,) * 4 if positions is None else (*positions[0], *positions[1])
    heads: Axes = ("batch", None, "heads", None)

    def run(q: Array, k: Array, v: Array, *given: Any) -> tuple[Array]:
        positions = None if given[0] is None else (Positions(*given[:2]), Positions(*given[2:]))
        return (_attend_in_blocks(q, k, v, scale, window, positions, implementation, block),)

    shared = positions is not None and positions[0].segment.shape[0] != q.shape[0]  # one row for all
    by_token: Axes = (None if shared else "batch", None)
    (o,) = by_parts(run, (q, k, v, *given), (heads,) * 3 + (by_token,) * 4, (heads,), kernels=implementation == "cudnn")
    result: Array = o
    return result


def require_attention(implementation: str | None, q: Array | None = None) -> None:
    """Raises a ValueError if there is no such implementation of attention, or it cannot take these queries here."""
    if implementation not in (None, "xla", "cudnn"):
        raise ValueError(f'implementation must be None, "xla" or "cudnn", got {implementation!r}')
    if implementation == "cudnn" and q is not None:
        reason = None
        if device.platform() != "gpu":
            reason = f"it runs on NVIDIA GPUs, and this is a {device.platform()}"
        elif str(q.dtype) not in ("bfloat16", "float16"):
            reason = f"it takes bfloat16 and float16, not {q.dtype}"
        if reason is not None:
            raise ValueError(f"implementation='cudnn' cannot run here: {reason}.")


def _attend_in_blocks(
    q: Array,
    k: Array,
    v: Array,
    scale: Any,
    window: int | None,
    positions: tuple[Positions, Positions] | None,
    implementation: str | None,
    block: int,
) -> Array:
    time, past = q.shape[1], k.shape[1] - q.shape[1]
    whole = positions is None
    if positions is None:
        index = jnp.arange(time, dtype=jnp.int32)[None]
        positions = (Positions(jnp.zeros_like(index), index),) * 2
    if implementation == "cudnn":
        return _attend_cudnn(q, k, v, visible(*positions, window), scale=scale, window=window, causal=whole)
    size = max(block, -(-time // 16)) if isinstance(time, int) else time  # a symbolic time is one block
    if time <= size:
        return _attend(q, k, v, visible(*positions, window), scale=scale)

    def of_block(start: int) -> Array:
        first = 0 if window is None or past else max(0, start - window + 1)
        queries, keys = slice(start, start + size), slice(first, past + start + size)
        mask = visible(
            Positions(*(x[:, queries] for x in positions[0])), Positions(*(x[:, keys] for x in positions[1])), window
        )
        part: Array = jax.checkpoint(partial(_attend, scale=scale))(q[:, queries], k[:, keys], v[:, keys], mask)
        return part

    return jnp.concatenate([of_block(start) for start in range(0, time, size)], axis=1)


def _finite(x: Array) -> tuple[Array, Array]:
    """x [B, T, H, dim] with zeros for heads of tokens that are not finite, and which are, [B, T, H]."""
    finite = jnp.all(jnp.isfinite(x), axis=-1)
    return jnp.where(finite[..., None], x, jnp.zeros((), x.dtype)), finite


def _attend(q: Array, k: Array, v: Array, seen: Array, *, scale: Any) -> Array:
    """Attention of all queries at once to the keys that `seen` [B or 1, 1, T, S] shows them."""
    (q, good_q), (k, good_k), (v, good_v) = _finite(q), _finite(k), _finite(v)
    heads, groups = k.shape[2], q.shape[2] // k.shape[2]
    product = partial(jnp.einsum, preferred_element_type=accumulator_dtype(v.dtype))
    scores = product("btngk,bsnk->bngts", q.reshape(*q.shape[:2], heads, groups, -1), k)
    seen = seen[:, :, None]
    good = jnp.isfinite(scores) & jnp.moveaxis(good_k & good_v, 1, 2)[:, :, None, None]
    lost = jnp.any(seen & ~good, axis=-1) | ~_grouped(good_q, heads)
    kept = seen & ~lost[..., None]
    flipped = jnp.where(jnp.asarray(scale) < 0, -1, 1).astype(scores.dtype)  # a learned scale may be negative
    scores, scale = scores * flipped, scale * flipped
    # Scaled after the largest is taken away, which is then zero to the last bit: one of 1e30 has no rounding to spare. The
    # first selection is for the value, the second so that no cotangent enters an exponent.
    top = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True, where=kept, initial=-jnp.inf))
    scores = jnp.where(kept, scale * (scores - jnp.where(jnp.isfinite(top), top, 0)), -jnp.inf)
    weights = jnp.where(kept, jnp.exp(scores), 0)
    total = jnp.sum(weights, axis=-1)[..., None]
    # Divided after the product: cotangents of the weights of unseen keys never meet the others.
    o = product("bngts,bsnv->bngtv", weights.astype(v.dtype), v) / jnp.where(total > 0, total, 1)
    o = jnp.where(lost[..., None], jnp.nan, o)
    return jnp.moveaxis(o, 3, 1).reshape(*q.shape[:3], -1).astype(v.dtype)


def _grouped(x: Array, heads: int) -> Array:
    """[B, T, H] as [B, Hkv, H / Hkv, T]."""
    return jnp.moveaxis(x.reshape(*x.shape[:2], heads, -1), 1, 3)


def _attend_cudnn(
    q: Array, k: Array, v: Array, seen: Array, *, scale: float, window: int | None, causal: bool
) -> Array:
    """The same by the library's kernel; if `causal`, `seen` is what it makes itself."""
    (q, good_q), (k, good_k), (v, good_v) = _finite(q), _finite(k), _finite(v)
    unseen = jnp.moveaxis(~(good_k & good_v), 1, 2)[:, :, None]
    lost = jnp.repeat(jnp.any(seen & unseen, axis=-1), q.shape[2] // k.shape[2], axis=1)
    lost = jnp.moveaxis(lost, 1, 2) | ~good_q
    size = v.shape[-1]
    v = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, k.shape[-1] - size)))  # it wants values of the size of keys
    own: dict[str, Any] = {"mask": jnp.broadcast_to(seen, (q.shape[0], *seen.shape[1:]))}
    if causal:
        own = {"is_causal": True, "local_window_size": None if window is None else (window - 1, 0)}
    with jax.numpy_dtype_promotion("standard"):  # the library relies on it for types below float32
        o: Array = jax.nn.dot_product_attention(q, k, v, scale=scale, implementation="cudnn", **own)
    o = jnp.where(jnp.moveaxis(jnp.any(seen, axis=-1), 1, 2)[..., None], o[..., :size], jnp.zeros((), o.dtype))
    return jnp.where(lost[..., None], jnp.full((), jnp.nan, o.dtype), o)
