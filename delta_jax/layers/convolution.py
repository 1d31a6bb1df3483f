"""What comes before the op as layers call it: the short convolution of q, k or v, and heads of unit length."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from delta_jax.layers.mixer_cache import OfLayer
from delta_jax.layers.token_mixer import TokenMixer
from delta_jax.ops import device
from delta_jax.ops.partition import Axes
from delta_jax.ops.prologue import KERNELS, heads_of_unit_length, step_by_kernel, takes_kernel
from delta_jax.ops.short_convolution import short_convolution
from delta_jax.parallel import axis_of_tokens, by_shares, current_cut, indivisible, share_of, shares

__all__ = ["ShortConvolution", "convolved", "of_prologue", "unit_heads"]


_STREAM = ("batch", None, "heads")


class ShortConvolution(nnx.Module):
    """The weights of `short_convolution`, and the activation that follows.

    Args:
        owner: the layer whose dtypes and initialisation it shares.
        size: width in tokens.
        channels: width of the stream.
        rngs: where the initial parameters come from.
        use_bias: whether there is a bias, which begins at zero.
        activation: of those of `short_convolution`.
    """

    def __init__(
        self,
        owner: TokenMixer,
        size: int,
        channels: int,
        rngs: nnx.Rngs,
        *,
        use_bias: bool = False,
        activation: str = "silu",
    ):
        normal = jax.random.normal(rngs.params(), (size, channels), owner.param_dtype)
        self.kernel = nnx.Param(owner.initializer_std * normal)
        if use_bias:
            self.bias = nnx.Param(jnp.zeros((channels,), owner.param_dtype))
        self.use_bias = use_bias
        self.activation = activation

    def __call__(
        self,
        x: Float[Array, "batch time channels"],
        segment_ids: Int[Array, "batch time"] | None,
        cache: Float[Array, "batch tail channels"] | None,
        lengths: Int[Array, " batch"] | None = None,
        *,
        heads: int | None = None,
        implementation: str | None = None,
    ) -> tuple[Float[Array, "batch time channels"], Float[Array, "batch tail channels"]]:
        """The stream after convolution and activation, and with `heads` each of so many of unit length; the new cache."""
        kernel, bias = _weights(self)
        parts = x.shape[2] if heads is None else heads
        uneven = indivisible(x.shape[0], parts)
        # How many tokens of a row are there counts from its beginning: then every device has the row whole.
        axis = None if uneven or lengths is not None else axis_of_tokens(x.shape[1])
        time = None if axis is None else "time"
        stream = ("batch", time, "heads")
        chosen = _takes_kernel(self, x, heads, implementation, stream=stream)

        def run(x: Array, kernel: Array, *rest: Array | None, **options: str | None) -> tuple[Array, Array]:
            bias, segment_ids, cache, lengths = rest
            return short_convolution(
                x,
                kernel,
                bias=bias,
                activation=self.activation,
                heads=None if heads is None else heads * x.shape[2] // channels,
                segment_ids=segment_ids,
                cache=cache,
                lengths=lengths,
                **options,
            )

        channels = x.shape[2]
        arrays = (x, kernel, bias, segment_ids, cache, lengths)
        if uneven or not (chosen or axis):
            return run(*arrays, implementation="xla")
        axes = (stream, (None, "heads"), ("heads",), ("batch", time), _STREAM, ("batch",))
        local = partial(run, implementation=None if chosen else "xla", axis_name=axis)
        result: tuple[Array, Array] = by_shares(local, arrays, axes, (stream, _STREAM))
        return result


def convolved(
    convolutions: Sequence[ShortConvolution],
    streams: Sequence[Float[Array, "batch time _"]],
    segment_ids: Int[Array, "batch time"] | None,
    caches: Sequence[Float[Array, "batch _ _"] | OfLayer],
    lengths: Int[Array, " batch"] | None,
    *,
    heads: Sequence[int | None],
    implementation: str | None,
) -> tuple[tuple[Array, ...], tuple[Array | OfLayer, ...]]:
    """Every stream by its convolution, and the new caches; those that lie among others stay there.

    A few tokens of all streams take one kernel where it can run.
    """
    stacks = [cache for cache in caches if isinstance(cache, OfLayer)]
    parts = min(x.shape[2] if n is None else n for x, n in zip(streams, heads, strict=True))
    if stacks and segment_ids is None and lengths is None and shares(streams[0].shape[0], parts):
        each = zip(convolutions, streams, heads, strict=True)
        if all(_takes_kernel(f, x, n, implementation, step=True) for f, x, n in each):
            return _in_place(convolutions, streams, stacks, heads)
    ys, tails = [], []
    for f, x, cache, n in zip(convolutions, streams, caches, heads, strict=True):
        before = cache.taken() if isinstance(cache, OfLayer) else cache
        y, tail = f(x, segment_ids, before, lengths, heads=n, implementation=implementation)
        ys.append(y)
        tails.append(cache.put(tail) if isinstance(cache, OfLayer) else tail)
    return tuple(ys), tuple(tails)


def _in_place(
    convolutions: Sequence[ShortConvolution],
    streams: Sequence[Array],
    stacks: Sequence[OfLayer],
    heads: Sequence[int | None],
) -> tuple[tuple[Array, ...], tuple[OfLayer, ...]]:
    count, layer = len(streams), stacks[0].layer
    sizes = [None if n is None else x.shape[2] // n for x, n in zip(streams, heads, strict=True)]

    def run(*arrays: Any) -> tuple[list[Array], list[Array]]:
        x, kernels, biases, tails = (arrays[n * count : (n + 1) * count] for n in range(4))
        activations = [f.activation for f in convolutions]
        return step_by_kernel(x, kernels, biases, tails, arrays[-1], activations=activations, sizes=sizes)

    kernels, biases = zip(*map(_weights, convolutions), strict=True)
    tails = (None, "batch", None, "heads")
    ys, new = by_shares(
        run,
        (*streams, *kernels, *biases, *(stack.stack for stack in stacks), layer),
        (*(axes for axes in (_STREAM, (None, "heads"), ("heads",), tails) for _ in range(count)), ()),
        ([_STREAM] * count, [tails] * count),
    )
    return tuple(ys), tuple(OfLayer(x, layer) for x in new)


def _weights(convolution: ShortConvolution) -> tuple[Array, Array | None]:
    """The kernel, and the bias if there is one."""
    return convolution.kernel[...], convolution.bias[...] if convolution.use_bias else None


def _takes_kernel(
    convolution: ShortConvolution,
    x: Array,
    heads: int | None,
    implementation: str | None,
    *,
    stream: Axes = _STREAM,
    step: bool = False,
) -> bool:
    """Whether a kernel handles a stream, or what a device has of it; with `step` that of a few tokens in place."""
    share = share_of(x, stream) if shares(x.shape[0], x.shape[2] if heads is None else heads) else x
    return takes_kernel(
        share,
        width=convolution.kernel.shape[0],
        bias=convolution.use_bias,
        activation=convolution.activation,
        heads=None if heads is None else heads * share.shape[2] // x.shape[2],
        step=step,
        implementation=of_prologue(implementation),
    )


def of_prologue(implementation: str | None) -> str | None:
    """What a layer's choice for its op is for what comes before: kernels by their name run there where they can."""
    return None if implementation in (None, *KERNELS) else "xla"


def unit_heads(
    x: Float[Array, "*leading size"], eps: float, implementation: str | None
) -> Float[Array, "*leading size"]:
    """`heads_of_unit_length`, on a mesh every device its own sequences and heads, by the compiler where these are uneven."""
    cut = current_cut()
    if cut is None:
        if implementation is None and not shares(x.shape[0]):
            implementation = "xla"
        return heads_of_unit_length(x, eps, implementation)
    if x.ndim < 4 or implementation == "xla" or indivisible(x.shape[0], x.shape[-2]) or device.platform() != "tpu":
        return heads_of_unit_length(x, eps, "xla")
    axes = ("batch", "time", *(None,) * (x.ndim - 4), "heads", None)
    result: Array = by_shares(
        partial(heads_of_unit_length, eps=eps, implementation=implementation), (x,), (axes,), axes
    )
    return result
