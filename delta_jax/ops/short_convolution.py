"""Depthwise causal convolution over time, and what follows it: the short filter in front of q, k and v."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from delta_jax.ops import sequence
from delta_jax.ops.arguments import checked_array, require_count
from delta_jax.ops.norm import EPS, unit_length
from delta_jax.ops.padding import first_tokens, select_tokens
from delta_jax.ops.partition import Axes, by_parts
from delta_jax.ops.precision import accumulator_dtype
from delta_jax.ops.prologue import by_kernel, takes_kernel
from delta_jax.ops.segments import positions, segment_numbers

__all__ = ["ACTIVATIONS", "short_convolution"]

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "elu": lambda x: jax.nn.elu(x) + 1,
    "identity": lambda x: x,
}


def short_convolution(
    x: Float[Array, "batch time channels"],
    kernel: Float[Array, "width channels"],
    *,
    bias: Float[Array, " channels"] | None = None,
    activation: str = "identity",
    heads: int | None = None,
    segment_ids: Int[Array, "batch time"] | None = None,
    cache: Float[Array, "batch tail channels"] | None = None,
    lengths: Int[Array, " batch"] | None = None,
    implementation: str | None = None,
    axis_name: str | None = None,
) -> tuple[Float[Array, "batch time channels"], Float[Array, "batch tail channels"]]:
    """Filters every channel over its own past.

        y[t] = unit_length(activation(sum_{j < width} kernel[width - 1 - j] * x[t - j] + bias))

    where only the sum is there unless more is asked for. A tap that would reach before the sequence, or over a change of
    the segment id, contributes zero, by selection: whatever it holds, it reaches no output and no gradient. A tap inside
    the segment that is not finite makes the outputs that see it NaN, channel by channel, or head by head if these have
    unit length, and nothing else.

    The cache holds the last `width - 1` inputs, oldest first, and zeros in place of those that no later
    token of the same segment may see; so a continued call is exact and needs no old segment ids. A caller
    that continues with a new segment passes zeros (or no cache).

    Args:
        x: inputs [B, T, C]; T may be smaller than the width.
        kernel: weights [W, C]; the last row multiplies the current input.
        bias: [C], added to the sum; None is none.
        activation: of what that gives: "identity", "silu", "relu" or "elu", which is elu + 1.
        heads: how many heads the channels are, each of which is divided by its length, `sqrt(sum(y^2) + 1e-6)`; None divides
            nothing.
        segment_ids: [B, T], constant within a packed sequence; None is one segment.
        cache: [B, W - 1, C], what a former call returned; None is the start of a sequence. It belongs to the
            segment of the first token.
        lengths: [B] int32, how many tokens of a row are real, the first ones; None is all. What follows is padding: its
            outputs are zero, and the new cache is the one after the last real token.
        implementation: "xla", the definition; "pallas", one kernel on TPUs, which the compiler cannot cut over a mesh and
            which is differentiable once, in reverse mode; None is that where it can run.
        axis_name: inside `jax.shard_map`, the axis of the mesh over which tokens are cut: x and `segment_ids` are those of
            this device, at least W - 1 tokens, and the caches are those before and after all tokens. None: x is all.

    Returns:
        y [B, T, C] in the dtype of x (products are summed in float32 at least), and the new cache.

    Raises:
        ValueError: an array has another shape or kind; the sentence names it and the axes that were wanted. An option is
            none of these, or the implementation cannot run here.
    """
    x = checked_array("x", x, dict.fromkeys(("batch", "time", "channels")))
    batch, time, channels = x.shape
    kernel = checked_array("kernel", kernel, {"width": None, "channels": channels})
    tail = kernel.shape[0] - 1
    if tail < 0:
        raise ValueError(f"kernel must be at least one token wide, got shape {kernel.shape}.")
    if bias is not None:
        bias = checked_array("bias", bias, {"channels": channels})
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}.")
    if heads is not None:
        require_count("heads", heads)
        if channels % heads:
            raise ValueError(f"heads must divide the {channels} channels of x, got {heads}.")
    if segment_ids is not None:
        segment_ids = checked_array("segment_ids", segment_ids, {"batch": batch, "time": time}, "integers")
    if cache is None:
        cache = jnp.zeros((batch, tail, channels), x.dtype)
    cache = checked_array("cache", cache, {"batch": batch, "tail": tail, "channels": channels})
    if lengths is not None:
        lengths = checked_array("lengths", lengths, {"batch": batch}, "integers")
    if axis_name is not None:
        sequence.require_axis(axis_name, {"lengths": lengths})
        if time < tail:
            raise ValueError(f"x must have at least {tail} tokens on every device of {axis_name!r}, got {time}.")

    axes: tuple[Axes, ...] = (
        ("batch", None, "heads"),
        (None, "heads"),
        ("heads",),
        ("batch", None),
        ("batch", None, "heads"),
        ("batch",),
        ("heads",),
    )
    whole = None if heads is None else jnp.zeros((heads,), x.dtype)  # heads are not cut in two
    head = None if heads is None else channels // heads
    chosen = functools.partial(
        takes_kernel, width=tail + 1, bias=bias is not None, activation=activation, implementation=implementation
    )

    def convolve(
        x: Array,
        kernel: Array,
        bias: Array | None,
        segment_ids: Array | None,
        cache: Array,
        lengths: Array | None,
        _: Array | None,
    ) -> tuple[Array, Array]:
        cache = cache.astype(x.dtype)
        segments = None if segment_ids is None else segment_numbers(segment_ids)
        if axis_name is not None:
            cache = _from_before(x, segment_ids, segments, cache, axis_name)
        heads = None if head is None else x.shape[2] // head
        if chosen(x, heads=heads):
            reach = _reach(segment_ids, lengths, x.shape, tail)
            y = by_kernel(x, kernel, bias, reach, cache, activation=activation, heads=heads)
        else:
            y = _convolve(x, kernel, bias, segments, cache, lengths, ACTIVATIONS[activation], heads)
        new = _new_cache(x, segments, cache, lengths)
        return y, new if axis_name is None else sequence.of_last(new, axis_name)

    result: tuple[Array, Array] = by_parts(
        convolve,
        (x, kernel, bias, segment_ids, cache, lengths, whole),
        axes,
        (axes[0], axes[4]),
        kernels=chosen(x, heads=heads),
    )
    return result


def _convolve(
    x: Array,
    kernel: Array,
    bias: Array | None,
    segments: Array | None,
    cache: Array,
    lengths: Array | None,
    activation: Callable[[Array], Array],
    heads: int | None,
) -> Array:
    """The definition."""
    time, tail = x.shape[1], kernel.shape[0] - 1
    accumulate = accumulator_dtype(x.dtype)
    # Zero times NaN would be in the kernel's gradient.
    clean, before = (jnp.where(jnp.isfinite(x), x, jnp.zeros((), x.dtype)) for x in (x, cache))
    y, lost = jnp.zeros(x.shape, accumulate), jnp.zeros(x.shape, jnp.bool_)
    for back in range(tail, -1, -1):
        # Cut for every tap out of what was given: of all inputs side by side, or a mask of them, XLA writes an array.
        tap, bad = _earlier(before, clean, back).astype(accumulate), ~jnp.isfinite(_earlier(cache, x, back))
        if segments is not None and back:
            same = (jnp.pad(segments, ((0, 0), (back, 0)))[:, :time] == segments)[..., None]
            tap, bad = jnp.where(same, tap, 0.0), bad & same
        y, lost = y + tap * kernel[None, None, tail - back].astype(accumulate), lost | bad
    y = y.astype(x.dtype)
    if bias is not None:
        y = y + bias.astype(y.dtype)[None, None]
    # Selected before the activation, which keeps NaN: for its gradient one array is kept in place of two.
    y = activation(jnp.where(lost, jnp.asarray(jnp.nan, y.dtype), y))
    if heads is not None:
        y = unit_length(y.reshape(*y.shape[:2], heads, -1), EPS).reshape(y.shape)
    return y if lengths is None else select_tokens(first_tokens(lengths, time), y)


def _earlier(cache: Array, x: Array, back: int) -> Array:
    """What came so many tokens before each."""
    return jnp.concatenate([cache[:, cache.shape[1] - back :], x], axis=1)[:, : x.shape[1]] if back else x


def _reach(segment_ids: Array | None, lengths: Array | None, shape: tuple[int, ...], tail: int) -> Array | None:
    """How many tokens before its own a token sees, -1 where it is padding; None where all see as many as there are."""
    if segment_ids is None and lengths is None:
        return None
    reach = jnp.full(shape[:2], tail, jnp.int32)
    if segment_ids is not None:
        here = positions(segment_ids)  # the first segment continues that of the cache
        reach = jnp.where(here.segment == 0, reach, jnp.minimum(here.position, reach))
    return reach if lengths is None else jnp.where(first_tokens(lengths, shape[1]), reach, -1)


def _from_before(x: Array, segment_ids: Array | None, segments: Array | None, cache: Array, axis_name: str) -> Array:
    """The last inputs of the device before this one, of the segment of the first token here; the first has the cache."""
    last = sequence.from_before(_new_cache(x, segments, cache, None), axis_name)
    if segment_ids is not None:
        same = sequence.from_before(segment_ids[:, -1:], axis_name) == segment_ids[:, :1]
        last = jnp.where(same[..., None], last, jnp.zeros((), x.dtype))
    return jnp.where(jax.lax.axis_index(axis_name) == 0, cache, last)


def _new_cache(x: Array, segments: Array | None, cache: Array, lengths: Array | None) -> Array:
    """The last inputs of a row, those before x in `cache`, and zeros for those of other segments than the last."""
    tail = cache.shape[1]

    def at_end(x: Array, before: Array) -> Array:
        if lengths is None or not tail:
            if isinstance(x.shape[1], int):  # of a length that is a symbol all may be recent
                x = x[:, max(x.shape[1] - tail, 0) :]
            recent = jnp.concatenate([before, x], axis=1)
            return recent[:, recent.shape[1] - tail :]
        index = lengths[:, None] + jnp.arange(-tail, 0, dtype=lengths.dtype)[None]

        def taken(x: Array, index: Array) -> Array:
            index = jnp.clip(index, 0, x.shape[1] - 1)
            return jnp.take_along_axis(x, index.reshape(index.shape + (1,) * (x.ndim - 2)), axis=1)

        inside = (index >= 0).reshape(index.shape + (1,) * (x.ndim - 2))
        return jnp.where(inside, taken(x, index), taken(before, index + tail))

    new = at_end(x, cache)
    if segments is not None and tail:
        segment = at_end(segments, jnp.zeros(cache.shape[:2], segments.dtype))
        new = jnp.where((segment == segment[:, -1:])[..., None], new, jnp.zeros((), x.dtype))
    return new
