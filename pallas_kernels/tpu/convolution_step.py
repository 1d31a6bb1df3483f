"""A few tokens of the short convolutions of several streams, and what follows them, where their tails lie.

As `pallas_kernels.tpu.convolution` has it, of a few tokens: a grid step handles some sequences, all channels of all streams,
in groups of whole heads. The inputs that a later token will see take the place of those that these saw.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.batching import one_by_one
from pallas_kernels.tpu.convolution import Prologue, advance, group_of, lengths, or_nan, unsupported_stream
from pallas_kernels.tpu.plan import rows_of_batch, side_by_side, vmem_bytes
from pallas_kernels.tpu.tile import Ref

_MOST = 8  # tokens, the loop over which is unrolled


class Stream(NamedTuple):
    """Some tokens of a stream, and the kernel of its convolution, that of the oldest input first."""

    x: Any  # [batch, time, channels]; in a grid step a list of [rows, channels]
    kernel: Any  # [width, channels]
    bias: Any  # [channels], or None


def unsupported(x: Array | jax.ShapeDtypeStruct, options: Prologue) -> str | None:
    """Why the kernel cannot take a stream `[batch, time, channels]`; None if it can."""
    if not isinstance(x.shape[1], int) or x.shape[1] > _MOST:
        return f"the Pallas TPU kernel of a step takes at most {_MOST} tokens, not {x.shape[1]}"
    if options.width < 2:
        return "the Pallas TPU kernel of a step takes convolutions of at least 2 tokens"
    return unsupported_stream(x, options)


def convolution_step(
    options: tuple[Prologue, ...], streams: tuple[Stream, ...], tails: tuple[Array, ...], layer: Array
) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """The outputs `[batch, time, channels]`, in the dtypes of the inputs, and `tails` with the new ones of this layer.

    `tails` are `[layers, batch, width - 1, channels]`, oldest first, in the dtypes of the inputs.
    """
    ys, tails = one_by_one(functools.partial(_step, options))(streams, tails, layer)
    return ys, tails


def _step(
    options: tuple[Prologue, ...], streams: tuple[Stream, ...], tails: tuple[Array, ...], layer: Array
) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    batch, time = streams[0].x.shape[:2]
    rows = rows_of_batch(batch)
    alone = rows == 1

    def cut(x: Array) -> Array:
        return x.reshape(*x.shape[:-2], batch // rows, rows, x.shape[-1])

    def of_token(channels: int, t: int = 0) -> pl.BlockSpec:
        return pl.BlockSpec((None, rows, channels), lambda b, layer: (b, 0, t))

    def of_layer(x: Array) -> pl.BlockSpec:
        if alone:
            return pl.BlockSpec((None, None, *x.shape[2:]), lambda b, layer: (layer[0], b, 0, 0))
        return pl.BlockSpec((None, x.shape[1], None, rows, x.shape[-1]), lambda b, layer: (layer[0], 0, b, 0, 0))

    def whole(x: Array | None) -> pl.BlockSpec | None:
        return None if x is None else pl.BlockSpec(x.shape, lambda b, layer: (0, 0))

    # Sequences below each other, as XLA leaves a product, and the inputs of every age likewise; of one sequence the ages.
    aged = tails if alone else tuple(cut(jnp.swapaxes(x, 1, 2)) for x in tails)
    given, specs, outs, shapes = [], [], [], []
    for x, kernel, bias in streams:
        channels = x.shape[2]
        bias = None if bias is None else bias[None]
        parts = side_by_side(x, rows)
        given.append(Stream([part for part, _ in parts], kernel, bias))
        specs.append(Stream([of_token(channels, t) for _, t in parts], whole(kernel), whole(bias)))
        outs.append([of_token(channels)] * time)
        shapes.append([jax.ShapeDtypeStruct((batch // rows, rows, channels), x.dtype)] * time)
    places = [of_layer(x) for x in aged]
    before, after = 1 + len(jax.tree.leaves(given)), len(streams) * time
    ys, aged = pl.pallas_call(
        functools.partial(_body, options),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch // rows,),
            in_specs=[specs, places],
            out_specs=[outs, places],
        ),
        out_shape=[shapes, [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in aged]],
        input_output_aliases={before + n: after + n for n in range(len(aged))},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=vmem_bytes()),
        name="short_convolution_step",
    )(layer.astype(jnp.int32).reshape(1), given, list(aged))
    new = aged if alone else [jnp.swapaxes(x.reshape(*x.shape[:2], batch, -1), 1, 2) for x in aged]
    return tuple(jnp.stack([x.reshape(batch, -1) for x in y], 1) for y in ys), tuple(new)


def _body(
    options: tuple[Prologue, ...],
    layer: Ref,
    streams: list[Stream],
    tails: list[Ref],
    ys: list[list[Ref]],
    new: list[Ref],
) -> None:
    del layer

    def of_group(n: int, at: slice) -> Iterator[None]:
        stream, width = streams[n], options[n].width
        places = [
            (slice(age, age + 1), at) if tails[n].ndim == 2 else (age, slice(None), at) for age in range(width - 1)
        ]
        inputs = [tails[n][place] for place in places] + [x[:, at] for x in stream.x]
        for place, last in zip(places, inputs[len(stream.x) :], strict=True):
            new[n][place] = last
        taps = [or_nan(x.astype(jnp.float32)) for x in inputs]
        kernel = stream.kernel[:, at].astype(jnp.float32)
        for t, y in enumerate(ys[n]):
            z = taps[t] * kernel[:1]
            for age in range(1, width):
                z = z + taps[t + age] * kernel[age : age + 1]
            if stream.bias is not None:
                z = z + stream.bias[:, at].astype(jnp.float32)
            if options[n].silu:
                z = z * jax.nn.sigmoid(z)
            if options[n].head:
                length = yield from lengths(options[n], z, True)
                z = jnp.where(length.bad, jnp.nan, length.unit * length.rest)
            y[:, at] = z.astype(y.dtype)

    works: list[Iterator[None]] = []
    for n, (stream, chosen) in enumerate(zip(streams, options, strict=True)):
        channels, size = stream.x[0].shape[-1], group_of(chosen)
        works += [of_group(n, slice(start, min(start + size, channels))) for start in range(0, channels, size)]
    while works:
        works = advance(works)
