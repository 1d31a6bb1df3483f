"""Depthwise causal convolution over time: the short filter in front of q, k and v."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from delta_jax.ops.arguments import checked_array
from delta_jax.ops.padding import first_tokens, select_tokens
from delta_jax.ops.partition import Axes, by_parts
from delta_jax.ops.precision import accumulator_dtype
from delta_jax.ops.segments import segment_numbers

__all__ = ["short_convolution"]


def short_convolution(
    x: Float[Array, "batch time channels"],
    kernel: Float[Array, "width channels"],
    *,
    segment_ids: Int[Array, "batch time"] | None = None,
    cache: Float[Array, "batch tail channels"] | None = None,
    lengths: Int[Array, " batch"] | None = None,
) -> tuple[Float[Array, "batch time channels"], Float[Array, "batch tail channels"]]:
    """Filters every channel over its own past.

        y[t] = sum_{j < width} kernel[width - 1 - j] * x[t - j]

    where a tap that would reach before the sequence, or over a change of the segment id, contributes zero, by selection:
    whatever it holds, it reaches no output and no gradient. A tap inside the segment that is not finite makes the outputs
    that see it NaN, channel by channel, and nothing else.

    The cache holds the last `width - 1` inputs, oldest first, and zeros in place of those that no later
    token of the same segment may see; so a continued call is exact and needs no old segment ids. A caller
    that continues with a new segment passes zeros (or no cache).

    Args:
        x: inputs [B, T, C]; T may be smaller than the width.
        kernel: weights [W, C]; the last row multiplies the current input.
        segment_ids: [B, T], constant within a packed sequence; None is one segment.
        cache: [B, W - 1, C], what a former call returned; None is the start of a sequence. It belongs to the
            segment of the first token.
        lengths: [B] int32, how many tokens of a row are real, the first ones; None is all. What follows is padding: its
            outputs are zero, and the new cache is the one after the last real token.

    Returns:
        y [B, T, C] in the dtype of x (products are summed in float32 at least), and the new cache.

    Raises:
        ValueError: an array has another shape or kind; the sentence names it and the axes that were wanted.
    """
    x = checked_array("x", x, dict.fromkeys(("batch", "time", "channels")))
    batch, time, channels = x.shape
    kernel = checked_array("kernel", kernel, {"width": None, "channels": channels})
    tail = kernel.shape[0] - 1
    if tail < 0:
        raise ValueError(f"kernel must be at least one token wide, got shape {kernel.shape}.")
    if segment_ids is not None:
        segment_ids = checked_array("segment_ids", segment_ids, {"batch": batch, "time": time}, "integers")
    if cache is None:
        cache = jnp.zeros((batch, tail, channels), x.dtype)
    cache = checked_array("cache", cache, {"batch": batch, "tail": tail, "channels": channels})
    if lengths is not None:
        lengths = checked_array("lengths", lengths, {"batch": batch}, "integers")

    axes: tuple[Axes, ...] = (
        ("batch", None, "heads"),
        (None, "heads"),
        ("batch", None),
        ("batch", None, "heads"),
        ("batch",),
    )
    result: tuple[Array, Array] = by_parts(
        _convolve, (x, kernel, segment_ids, cache, lengths), axes, (axes[0], axes[3])
    )
    return result


def _convolve(
    x: Array, kernel: Array, segment_ids: Array | None, cache: Array, lengths: Array | None
) -> tuple[Array, Array]:
    time, tail = x.shape[1], kernel.shape[0] - 1
    accumulate = accumulator_dtype(x.dtype)
    inputs = jnp.concatenate([cache.astype(x.dtype), x], axis=1)
    segments = None if segment_ids is None else jnp.pad(segment_numbers(segment_ids), ((0, 0), (tail, 0)))
    finite = jnp.isfinite(inputs)  # zero times NaN would be in the kernel's gradient
    clean = jnp.where(finite, inputs, jnp.zeros((), x.dtype))
    y, lost = jnp.zeros(x.shape, accumulate), jnp.zeros(x.shape, jnp.bool_)
    for offset in range(tail + 1):
        here = slice(offset, offset + time)
        tap, bad = clean[:, here].astype(accumulate), ~finite[:, here]
        if segments is not None and offset < tail:
            same = (segments[:, here] == segments[:, tail:])[..., None]
            tap, bad = jnp.where(same, tap, 0.0), bad & same
        y, lost = y + tap * kernel[None, None, offset].astype(accumulate), lost | bad
    y = jnp.where(lost, jnp.nan, y)

    if lengths is not None:
        y = select_tokens(first_tokens(lengths, time), y)

    def at_end(x: Array) -> Array:
        if lengths is None:
            return x[:, time:]
        index = lengths[:, None] + jnp.arange(tail, dtype=lengths.dtype)[None]
        return jnp.take_along_axis(x, index.reshape(index.shape + (1,) * (x.ndim - 2)), axis=1)

    new_cache = at_end(inputs)
    if segments is not None:
        segment = at_end(segments)
        new_cache = jnp.where((segment == segment[:, -1:])[..., None], new_cache, jnp.zeros((), x.dtype))
    return y.astype(x.dtype), new_cache
