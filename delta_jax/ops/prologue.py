"""The kernel for TPUs of what comes between a projection and the rule: when it runs, and its gradient."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from delta_jax.ops import device
from delta_jax.ops.arguments import checked_array
from delta_jax.ops.norm import EPS, unit_length
from delta_jax.ops.partition import explicit_mesh

__all__ = ["by_kernel", "heads_of_unit_length", "step_by_kernel", "takes_kernel"]

KERNELS = ("mosaic_tpu", "pallas")


def takes_kernel(
    x: Array | jax.ShapeDtypeStruct,
    *,
    width: int = 0,
    bias: bool = False,
    activation: str = "identity",
    heads: int | None = None,
    eps: float = EPS,
    step: bool = False,
    implementation: str | None = None,
) -> bool:
    """Whether the kernel handles a stream `[batch, time, channels]`: where it can, unless "xla" is asked for.

    `step` asks about `step_by_kernel`.

    Raises:
      ValueError: the kernel is asked for by name and cannot run; the sentence says why.
    """
    if implementation not in (None, "xla", *KERNELS):
        raise ValueError(f"implementation must be None, 'xla' or one of {', '.join(KERNELS)}, got {implementation!r}.")
    if implementation == "xla" or (implementation is None and device.platform() != "tpu"):
        return False
    from pallas_kernels.tpu import convolution, convolution_step

    if device.platform() != "tpu":
        why: str | None = f"the Pallas kernels of mosaic_tpu run on TPUs, and this is a {device.platform()}"
    elif activation not in ("identity", "silu"):
        why = f"the Pallas TPU kernels take the activations silu and identity, not {activation}"
    else:
        kernels = convolution_step if step else convolution
        why = kernels.unsupported(x, _options(x, width, bias, activation, heads, eps))
    if why is not None and implementation is not None:
        raise ValueError(f"implementation={implementation!r} cannot run here: {why}.")
    return why is None


def by_kernel(
    x: Array,
    kernel: Array | None = None,
    bias: Array | None = None,
    reach: Array | None = None,
    cache: Array | None = None,
    *,
    activation: str = "identity",
    heads: int | None = None,
    eps: float = EPS,
) -> Array:
    """What `takes_kernel` was asked about, of a kernel `[width, channels]` and the like; `reach` as the kernels take it."""
    weights = None
    if kernel is not None:
        rows = [kernel[::-1]] if bias is None else [kernel[::-1], bias[None]]
        weights = jnp.concatenate([row.astype(jnp.float32) for row in rows], 0)
        weights = jnp.broadcast_to(weights[None], (x.shape[0], *weights.shape))
    width = 0 if kernel is None else kernel.shape[0]
    options = _options(x, width, bias is not None, activation, heads, eps)
    result: Array = _run(options, x, weights, reach, cache)
    return result


def step_by_kernel(
    streams: Sequence[Array],
    kernels: Sequence[Array],
    biases: Sequence[Array | None],
    tails: Sequence[Array],
    layer: Array,
    *,
    activations: Sequence[str],
    sizes: Sequence[int | None],
) -> tuple[list[Array], list[Array]]:
    """A few tokens of several streams `[batch, time, channels]`, of which `takes_kernel` was asked about each.

    `tails` are those of all layers, `[layers, batch, width - 1, channels]`, of which this one is read, and the new one put
    in its place; `sizes` those of heads of unit length.
    """
    from pallas_kernels.tpu.convolution import Prologue
    from pallas_kernels.tpu.convolution_step import Stream, convolution_step

    given = tuple(Stream(*of_stream) for of_stream in zip(streams, kernels, biases, strict=True))
    options = tuple(
        Prologue(stream.kernel.shape[0], stream.bias is not None, activation == "silu", size or 0, EPS)
        for stream, activation, size in zip(given, activations, sizes, strict=True)
    )
    before = tuple(tail.astype(x.dtype) for tail, x in zip(tails, streams, strict=True))
    ys, after = convolution_step(options, given, before, layer)
    return list(ys), [new.astype(old.dtype) for new, old in zip(after, tails, strict=True)]


def heads_of_unit_length(x: Array, eps: float, implementation: str | None) -> Array:
    """`unit_length` of `[batch, time, ..., size]`, by the kernel where it can run and the compiler need not cut it."""
    if implementation in (None, "xla") and (x.ndim < 3 or explicit_mesh((x,)) is not None):
        return unit_length(x, eps)
    x = checked_array("x", x, {"...": None, "batch": None, "time": None, "size": None})
    flat = x.reshape(*x.shape[:2], -1)
    heads = flat.shape[2] // x.shape[-1]
    if not takes_kernel(flat, heads=heads, eps=eps, implementation=implementation):
        return unit_length(x, eps)
    return by_kernel(flat, heads=heads, eps=eps).reshape(x.shape)


def _options(
    x: Array | jax.ShapeDtypeStruct, width: int, bias: bool, activation: str, heads: int | None, eps: float
) -> Any:
    from pallas_kernels.tpu.convolution import Prologue

    head = 0 if heads is None else x.shape[2] // heads
    return Prologue(width=width, bias=bias, silu=activation == "silu", head=head, eps=eps)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(options: Any, x: Array, weights: Array | None, reach: Array | None, cache: Array | None) -> Array:
    from pallas_kernels.tpu import convolution

    return convolution.convolve(options, x, weights, reach, cache)


def _forward(options: Any, *arrays: Array | None) -> tuple[Array, tuple[Array | None, ...]]:
    return _run(options, *arrays), arrays


def _backward(options: Any, arrays: Any, d_y: Array) -> tuple[Array | None, ...]:
    from pallas_kernels.tpu import convolution

    x, weights, reach, cache = arrays
    d_x, d_weights, d_cache = convolution.cotangents(options, x, weights, reach, cache, d_y)
    if d_cache is not None:
        d_cache = jnp.where(jnp.isfinite(cache), d_cache, 0.0).astype(cache.dtype)
    return d_x, d_weights, None, d_cache


_run.defvjp(_forward, _backward)
