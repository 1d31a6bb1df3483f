"""What comes between a projection and the rule, in one pass: short convolution, bias, SiLU, every head of length one.

    z_t = sum_{j < width} weights[j] * x_{t - j} + bias     a = z * sigmoid(z)     y = a / sqrt(sum over a head(a^2) + eps)

each of which may be left out. A stream is read once and written once; on the way back the rest is computed again from it.

The kernels' grid is (batch, blocks of channels, blocks of time). A step handles one block `[rows, channels]` in chunks of
time and groups of whole heads, whose values stay in registers; several are in turns, so that none waits for its sums over
lanes. The forward goes through time in order and carries the last inputs, the backward in reverse and carries what the later
outputs give to earlier inputs.

An input that is not finite makes the outputs that see it NaN, channel by channel, and with heads of length one the whole
head of such a token; their cotangents count as zero, by selection. That and squares beyond float32 cost as much as the rest.
So a block is handled without such care, and again with it where a sum says that it was needed.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Generator, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.batching import joins_batch
from pallas_kernels.tpu.plan import vmem_bytes
from pallas_kernels.tpu.products import TILE, lanes, power_below, root_of

PAST = 8  # rows of a register: how many tokens before a chunk are at hand
PACKED = 16  # rows of a register of bfloat16
HEADS = range(64, 513, 64)
_WIDEST = 8192  # channels of a block that cannot be cut; the loop over its groups is unrolled
_CHANNELS, _ROWS = 512, 512  # of a block at most, but for one that cannot be cut
_REGISTERS = 8  # of a chunk and group
_FORWARD, _BACKWARD = 16, 8  # chunks and groups that are handled in turns
_ORDINARY = 1e-20  # with such an eps the squares that vanish in float32 do not count


@dataclasses.dataclass(frozen=True)
class Prologue:
    """What is done to a stream.

    Attributes:
      width: tokens of the convolution; 0 is none.
      bias: whether the row after the weights is a bias.
      silu: whether SiLU follows.
      head: channels of a head that is brought to length one; 0 is none.
      eps: added to the squared length.
    """

    width: int = 0
    bias: bool = False
    silu: bool = False
    head: int = 0
    eps: float = 1e-6


def unsupported(x: Array | jax.ShapeDtypeStruct, options: Prologue) -> str | None:
    """Why the kernels cannot take a stream `[batch, time, channels]`; None if they can."""
    if isinstance(x.shape[1], int) and x.shape[1] < PACKED:
        return f"the Pallas TPU kernels take {PACKED} tokens or more, not {x.shape[1]}"
    return unsupported_stream(x, options)


def unsupported_stream(x: Array | jax.ShapeDtypeStruct, options: Prologue) -> str | None:
    """The same, whatever the number of tokens."""
    if not all(isinstance(size, int) for size in x.shape):
        return f"the Pallas TPU kernels take streams of a known shape, not {x.shape}"
    if str(x.dtype) not in ("bfloat16", "float32"):
        return f"the Pallas TPU kernels take bfloat16 and float32, not {x.dtype}"
    if options.width > PAST:
        return f"the Pallas TPU kernels take convolutions of at most {PAST} tokens, not {options.width}"
    if options.head and options.head not in HEADS:
        return (
            f"the Pallas TPU kernels take heads of {HEADS[0]}, {HEADS[1]}, ... {HEADS[-1]} channels, not {options.head}"
        )
    if x.shape[2] % HEADS[0] or (x.shape[2] > _WIDEST and x.shape[2] % group_of(options)):
        return f"the Pallas TPU kernels take channels that fill half registers of {TILE} lanes, not {x.shape[2]}"
    return None


def convolve(options: Prologue, x: Array, weights: Array | None, reach: Array | None, cache: Array | None) -> Array:
    """The outputs, `[batch, time, channels]` in the dtype of x.

    `weights` is float32 `[batch, width, channels]`, that of the current token first, then the bias if there is one; `reach`
    `[batch, time]` how many tokens before its own a token sees, less than zero where its output is zero, None for all;
    `cache` the `width - 1` inputs before the first, oldest first.
    """
    return joins_batch(functools.partial(_convolve, options))(x, weights, reach, cache)


def cotangents(
    options: Prologue, x: Array, weights: Array | None, reach: Array | None, cache: Array | None, d_y: Array
) -> tuple[Array, Array | None, Array | None]:
    """Cotangents of `x`, `weights` and `cache` of `convolve`, the latter two float32; None for what is not there."""
    return joins_batch(functools.partial(_cotangents, options))(x, weights, reach, cache, d_y)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """How a call is cut: blocks of `rows` tokens and `channels`, chunks of `chunk` tokens, groups of lanes."""

    options: Prologue
    batch: int
    time: int
    all_channels: int
    channels: int
    rows: int
    chunk: int
    reaches: bool
    backward: bool

    @property
    def blocks(self) -> int:
        """Of time."""
        return pl.cdiv(self.time, self.rows)

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.batch, self.all_channels // self.channels, self.blocks

    @property
    def chunks(self) -> int:
        return self.rows // self.chunk

    @property
    def unrolled(self) -> int:
        """Chunks that are handled in turns."""
        wanted = -(-(_BACKWARD if self.backward else _FORWARD) // len(self.groups))
        return max(n for n in range(1, wanted + 1) if self.chunks % n == 0)

    @property
    def hopes(self) -> bool:
        """Whether all is handled as if it were finite and of ordinary size first: where what is not shows in some sum."""
        shows = self.options.head or (self.backward and self.options.width)
        return bool(shows) and (not self.options.head or self.options.eps > _ORDINARY)

    @property
    def groups(self) -> list[pl.Slice]:
        """Lanes of a block that are handled together."""
        size = group_of(self.options)
        return [pl.ds(start, min(size, self.channels - start)) for start in range(0, self.channels, size)]


def group_of(options: Prologue) -> int:
    """Lanes that are handled together: whole heads in whole registers."""
    return math.lcm(options.head or TILE, TILE)


def _plan(options: Prologue, x: Array, reaches: bool, *, backward: bool) -> _Plan:
    batch, time, all_channels = x.shape
    group = group_of(options)
    channels = all_channels
    if all_channels % group == 0:
        whole = all_channels // group
        channels = group * max(n for n in range(1, max(1, _CHANNELS // group) + 1) if whole % n == 0)
    chunk = max(PACKED, _REGISTERS * PAST * TILE // group // PACKED * PACKED)
    most = max(chunk, min(_ROWS, _ROWS * _CHANNELS // channels) // chunk * chunk)
    rows = min(most, pl.cdiv(time, chunk) * chunk)
    ragged = backward and time % rows > 0  # of what follows the last token nothing is written, but sums would see it
    return _Plan(options, batch, time, all_channels, channels, rows, chunk, reaches or ragged, backward)


def _operands(plan: _Plan, weights: Array | None, reach: Array | None, cache: Array | None) -> tuple[Array | None, ...]:
    """Weights, reaches and cache as the kernels read them: whole registers; the tokens of a chunk below each other."""
    if not plan.options.width:
        return None, None, None
    assert weights is not None
    assert cache is not None
    weights = jnp.pad(weights, ((0, 0), (0, -weights.shape[1] % PAST), (0, 0)))
    cache = jnp.pad(cache.astype(jnp.float32), ((0, 0), (PAST - cache.shape[1], 0), (0, 0)))
    if plan.reaches:
        if reach is None:
            reach = jnp.full((plan.batch, plan.time), PAST, jnp.int32)
        missing = plan.blocks * plan.rows - plan.time
        reach = jnp.pad(reach, ((0, 0), (0, missing)), constant_values=-1).astype(jnp.float32)
        reach = jnp.swapaxes(reach.reshape(plan.batch, plan.blocks, plan.chunks, plan.chunk), 2, 3)
    return weights, reach if plan.reaches else None, cache


def _rows_of(weights: Array | None) -> int:
    return 0 if weights is None else weights.shape[1]


def _convolve(options: Prologue, x: Array, weights: Array | None, reach: Array | None, cache: Array | None) -> Array:
    plan = _plan(options, x, reach is not None, backward=False)

    def body(
        x: Array, weights: Array, reach: Array | None, cache: Array, y: Array, past: Array, start: Array, wrong: Array
    ) -> None:
        if options.width:

            @pl.when(pl.program_id(2) == 0)
            def _() -> None:
                start[...] = or_nan(cache[0])

        def of_group(careful: bool, index: Array, seen: Array | None, at: pl.Slice) -> Iterator[None]:
            here = _chunk(plan, index)
            now = x[0, here, at].astype(jnp.float32)
            if options.width:
                now = or_nan(now) if careful else now
                window = jnp.concatenate([past[:, at], now], 0)
                past[:, at] = now[-PAST:]
                now = _filtered(options, _taps(options, window, seen), weights, at)
            if options.silu:
                now = now * jax.nn.sigmoid(now)
            if options.head:
                length = yield from lengths(options, now, careful)
                wrong[:, at] += _doubt(length, at)
                now = jnp.where(length.bad, jnp.nan, length.unit * length.rest)
            if seen is not None:
                now = jnp.where(seen >= 0, now, 0.0)
            y[0, here, at] = now.astype(y.dtype)

        def run(careful: bool) -> None:
            past[...] = start[...]
            wrong[...] = jnp.zeros_like(wrong)
            _over_chunks(plan, functools.partial(of_group, careful), reach, reverse=False)

        _unless_wrong(plan, run, wrong)
        start[...] = past[...]

    operands = _operands(plan, weights, reach, cache)
    of_stream = pl.BlockSpec((1, plan.rows, plan.channels), lambda b, c, t: (b, t, c))
    return pl.pallas_call(
        body,
        grid=plan.grid,
        in_specs=[of_stream, *_specs(plan, operands, lambda t: t)],
        out_specs=of_stream,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        scratch_shapes=[pltpu.VMEM((PAST, plan.channels), jnp.float32)] * 3,
        compiler_params=_parameters(),
        name="short_convolution_forward",
    )(x, *operands)


def _cotangents(
    options: Prologue, x: Array, weights: Array | None, reach: Array | None, cache: Array | None, d_y: Array
) -> tuple[Array, Array | None, Array | None]:
    plan = _plan(options, x, reach is not None, backward=True)
    width = options.width
    last = plan.blocks - 1
    halo = plan.rows // PACKED
    sums = (width + options.bias) * PAST
    taken = max(width - 1, 1) * PAST

    def body(
        x: Array,
        before: Array | None,
        weights: Array,
        reach: Array | None,
        cache: Array,
        d_y: Array,
        d_x: Array,
        d_weights: Array,
        d_cache: Array,
        later: Array,
        start: Array,
        wrong: Array,
        total: Array,
    ) -> None:
        first = pl.program_id(2) == last  # in time, the last to be handled
        if width:

            @pl.when(pl.program_id(2) == 0)
            def _() -> None:
                start[...] = jnp.zeros_like(start)
                d_weights[...] = jnp.zeros_like(d_weights)

        def of_group(careful: bool, index: Array, seen: Array | None, at: pl.Slice) -> Iterator[None]:
            here = _chunk(plan, index)
            z = now = x[0, here, at].astype(jnp.float32)
            if before is not None:
                at_start = pl.multiple_of(jnp.maximum(here.start - PACKED, 0), PACKED)
                inside = x[0, pl.ds(at_start, PACKED), at].astype(jnp.float32)[-PAST:]
                outside = before[0, :, at].astype(jnp.float32)[-PAST:]
                outside = jnp.where(first, cache[0, :, at], outside)
                past = jnp.where(index == 0, outside, inside)
                if careful:
                    now, past = or_nan(now), or_nan(past)
                taps = _taps(options, jnp.concatenate([past, now], 0), seen)
                z = _filtered(options, taps, weights, at)
            d = d_y[0, here, at].astype(jnp.float32)
            a, slope = z, None
            if options.silu:
                gate = jax.nn.sigmoid(z)
                a, slope = z * gate, gate * (1.0 + z * (1.0 - gate))
            if options.head:
                length = yield from lengths(options, a, careful)
                wrong[:, at] += _doubt(length, at)
                y = length.unit * length.rest
                if careful:
                    d, y = jnp.where(length.bad, 0.0, d), jnp.where(length.bad, 0.0, y)
                along = _of_heads(options, y * d, jnp.sum)
                yield
                d = (d - y * along) * length.rest * length.power
                d = jnp.where(length.bad, 0.0, d)
            if slope is not None:
                d = d * slope
            if width:
                lost = jnp.isnan(z) if careful else None
                d = _unless(lost if seen is None else seen < 0 if lost is None else lost | (seen < 0), d)
                for j, tap in enumerate(taps):
                    total[pl.ds(j * PAST, PAST), at] += _by_sublane(_unless(lost, tap * d))
                if options.bias:
                    total[pl.ds(width * PAST, PAST), at] += _by_sublane(d)
                given = d * weights[0, pl.ds(0, 1), at]
                for j in range(1, width):
                    mine = d if seen is None else jnp.where(seen >= j, d, 0.0)
                    of_later = pl.ds((j - 1) * PAST, PAST)
                    taken = jnp.concatenate([mine, later[of_later, at]], 0)[j : j + plan.chunk]
                    later[of_later, at] = mine[:PAST]
                    given = given + taken * weights[0, pl.ds(j, 1), at]
                d = jnp.where(jnp.isnan(now), 0.0, given) if careful else given
            elif options.head and careful:
                d = jnp.where(length.bad, 0.0, d)
            d_x[0, here, at] = d.astype(d_x.dtype)

        def run(careful: bool) -> None:
            later[...] = start[...]
            wrong[...] = jnp.zeros_like(wrong)
            if width:
                total[...] = jnp.zeros_like(total)
            _over_chunks(plan, functools.partial(of_group, careful), reach, reverse=True)
            if width and not careful:  # one input that is not finite, or cotangent, shows in the sums
                wrong[...] += total[:PAST] * 0.0

        _unless_wrong(plan, run, wrong)
        start[...] = later[...]
        if width:
            d_weights[0] += total[...]

            @pl.when(first)
            def _() -> None:
                none = jnp.zeros((PAST, plan.channels), jnp.float32)
                found = none
                for j in range(1, width):
                    row = jnp.concatenate([none, later[pl.ds((j - 1) * PAST, PAST)]], 0)[j : j + PAST]
                    found = found + row * weights[0, pl.ds(j, 1)]
                d_cache[0] = found

    operands = _operands(plan, weights, reach, cache)
    of_stream = pl.BlockSpec((1, plan.rows, plan.channels), lambda b, c, t: (b, last - t, c))
    of_past = pl.BlockSpec((1, PACKED, plan.channels), lambda b, c, t: (b, jnp.maximum((last - t) * halo - 1, 0), c))
    f32 = jnp.float32

    def whole(rows: int) -> pl.BlockSpec | None:
        return pl.BlockSpec((1, rows, plan.channels), lambda b, c, t: (b, 0, c)) if width else None

    def shape(rows: int) -> jax.ShapeDtypeStruct | None:
        return jax.ShapeDtypeStruct((plan.batch, rows, plan.all_channels), f32) if width else None

    d_x, d_weights, d_cache = pl.pallas_call(
        body,
        grid=plan.grid,
        in_specs=[
            of_stream,
            of_past if width else None,
            *_specs(plan, operands, lambda t: last - t),
            of_stream,
        ],
        out_specs=[of_stream, whole(sums), whole(PAST)],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype), shape(sums), shape(PAST)],
        scratch_shapes=[pltpu.VMEM((rows, plan.channels), f32) for rows in (taken, taken, PAST, max(sums, PAST))],
        compiler_params=_parameters(),
        name="short_convolution_backward",
    )(x, x if width else None, *operands, d_y)
    if width:
        d_weights = jnp.sum(d_weights.reshape(plan.batch, -1, PAST, plan.all_channels), 2)
        d_cache = d_cache[:, PAST + 1 - width :]
    return d_x, d_weights, d_cache


def _over_chunks(
    plan: _Plan,
    of_group: Callable[[Array, Array | None, pl.Slice], Iterator[None]],
    reach: Array | None,
    *,
    reverse: bool,
) -> None:
    """Every chunk of a block, several groups and chunks in turns: each waits where others compute."""

    @pl.loop(0, plan.chunks // plan.unrolled)
    def _(count: Array) -> None:
        indices = [count * plan.unrolled + n for n in range(plan.unrolled)]
        if reverse:
            indices = [plan.chunks - 1 - index for index in indices]
        under_way: list[Iterator[None]] = []
        for index in indices:
            seen = _reach_of(plan, reach, index)
            for at in plan.groups:
                under_way = advance([of_group(index, seen, at), *under_way])
        while under_way:
            under_way = advance(under_way)


def advance(works: list[Iterator[None]]) -> list[Iterator[None]]:
    """Each goes on to where it waits next; those that are not done."""
    done = object()
    return [work for work in works if next(work, done) is not done]


def _unless_wrong(plan: _Plan, run: Callable[[bool], None], wrong: Array) -> None:
    """Runs without care, which is right where all is finite, and where `wrong` then says that not all was, with care."""
    if not plan.hopes:
        run(True)
        return
    run(False)

    @pl.when(jnp.max(jnp.where(wrong[...] == 0.0, 0.0, 1.0)) > 0.0)
    def _() -> None:
        run(True)


def _specs(
    plan: _Plan, operands: tuple[Array | None, ...], time: Callable[[Array], Array]
) -> list[pl.BlockSpec | None]:
    """The blocks of weights, reaches and cache; `time` maps the last grid index to a block of time."""
    weights, reach, cache = operands

    def whole(x: Array | None) -> pl.BlockSpec | None:
        return None if x is None else pl.BlockSpec((1, x.shape[1], plan.channels), lambda b, c, t: (b, 0, c))

    of_reach = pl.BlockSpec((1, 1, plan.chunk, plan.chunks), lambda b, c, t: (b, time(t), 0, 0))
    return [whole(weights), None if reach is None else of_reach, whole(cache)]


def _parameters() -> pltpu.CompilerParams:
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=vmem_bytes()
    )


def _chunk(plan: _Plan, index: Array) -> pl.Slice:
    return pl.ds(pl.multiple_of(index * plan.chunk, plan.chunk), plan.chunk)


def _reach_of(plan: _Plan, reach: Array | None, index: Array) -> Array | None:
    """How far the tokens of a chunk see, a column."""
    if reach is None:
        return None
    block = reach[0, 0]
    return jnp.sum(jnp.where(lanes(*block.shape) == index, block, 0.0), 1, keepdims=True)


def or_nan(x: Array) -> Array:
    """Infinity becomes NaN, which no weight of zero hides and no sum loses."""
    return jnp.where(jnp.abs(x) < jnp.inf, x, jnp.nan)


def _taps(options: Prologue, window: Array, seen: Array | None) -> list[Array]:
    """What each row of weights multiplies: the inputs of a chunk, of which 8 more come before it, shifted by each offset."""
    size = window.shape[0] - PAST
    taps = [window[PAST - j : PAST - j + size] for j in range(options.width)]
    if seen is None:
        return taps
    return taps[:1] + [jnp.where(seen >= j, tap, 0.0) for j, tap in enumerate(taps) if j]


def _filtered(options: Prologue, taps: list[Array], weights: Array, at: pl.Slice) -> Array:
    z = taps[0] * weights[0, pl.ds(0, 1), at]
    for j, tap in enumerate(taps[1:], 1):
        z = z + tap * weights[0, pl.ds(j, 1), at]
    return z + weights[0, pl.ds(options.width, 1), at] if options.bias else z


class Length(NamedTuple):
    """What brings heads to length one: `unit * rest`, where `unit` is the head times a power of two.

    Of one head the factors are columns. Without care the power is one, and `squares` says whether that was right.
    """

    unit: Array
    rest: Array
    power: Array | float
    bad: Array | bool
    squares: Array


def lengths(options: Prologue, a: Array, careful: bool) -> Generator[None, None, Length]:
    """With care the largest entry, or the root of eps, is brought between a half and one: so are its squares' sum."""
    root = root_of(options.eps)
    power: Array | float = 1.0
    bad: Array | bool = False
    if careful:
        size = jnp.abs(a)
        largest = _of_heads(options, jnp.where(size < jnp.inf, size, jnp.inf), jnp.max)
        power = power_below(jnp.maximum(largest, root))
        a, bad = a * power, largest == jnp.inf
    squares = _of_heads(options, a * a, jnp.sum)
    yield
    return Length(a, jax.lax.rsqrt(squares + (root * power) ** 2), power, bad, squares)


def _doubt(length: Length, at: pl.Slice) -> Array:
    """Zero unless a sum of squares is not finite."""
    return jnp.broadcast_to(_by_sublane(length.squares * 0.0), (PAST, at.size))


def _unless(mask: Array | None, x: Array) -> Array:
    return x if mask is None else jnp.where(mask, 0.0, x)


def _of_heads(options: Prologue, x: Array, reduce: Callable[..., Array]) -> Array:
    """A reduction over each head of a group, to a column where it is one head, else at every lane."""
    count = x.shape[1] // options.head
    if count == 1:
        return reduce(x, 1, keepdims=True)
    lane = lanes(*x.shape)
    result = jnp.zeros_like(x)
    for n in range(count):
        mine = (lane >= n * options.head) & (lane < (n + 1) * options.head)
        result = jnp.where(mine, reduce(jnp.where(mine, x, 0.0), 1, keepdims=True), result)
    return result


def _by_sublane(x: Array) -> Array:
    """The sum over the registers of a chunk, below each other."""
    return jnp.sum(x.reshape(-1, PAST, x.shape[1]), 0)
