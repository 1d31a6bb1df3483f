"""The norm of every head of an output, its scale and its gate: one read and one write, forward and backward.

    y = x / sqrt(mean(x^2) + eps) * scale * activation(gate)

Entries of x that are not finite count as zeros, forward and backward, so that they reach no sum over tokens. XLA would sum
over the channels of a head in another layout than the products around it have, and copy into it and back. Here rows are
tokens, and heads lie side by side on the lanes, as the kernels of the op and the projections leave them.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.batching import joins_batch
from pallas_kernels.tpu.plan import vmem_bytes
from pallas_kernels.tpu.products import TILE, power_below, root_of

_ROWS, _WIDTH = 256, 1024  # of a grid step, at most; of a head that is wider, fewer rows
_WIDEST = 16384


class _Settings(NamedTuple):
    size: int
    eps: float
    activation: str
    keeps_nan: bool

    @property
    def name(self) -> str:
        return "rms_norm" if self.keeps_nan else "gated_norm"


def unsupported(channels: int, size: int, *dtypes: object) -> str | None:
    """Why the kernels cannot take heads of this size, side by side on so many channels; None if they can."""
    for dtype in dtypes:
        if str(dtype) not in ("bfloat16", "float32"):
            return f"the Pallas TPU kernels take bfloat16 and float32, not {dtype}"
    if not _width(channels, size):
        return (
            f"the Pallas TPU kernels cannot cut {channels // size} heads of {size} into whole registers of {TILE} lanes"
        )
    return None


def gated_norm(
    x: Array, scale: Array, gate: Array | None, *, eps: float, activation: str = "silu", keeps_nan: bool = False
) -> Array:
    """`[batch, time, heads * size]` in the dtype of `x`, differentiable; `scale` is `[size]`, `gate` as `x` or None.

    With `keeps_nan` a head of which an entry is not finite is NaN, by selection; its cotangents count as zeros.
    """
    settings = _Settings(scale.shape[0], eps, activation, keeps_nan)

    def flat(x: Array) -> Array:
        return x.reshape(1, -1, x.shape[-1])

    y = _run(settings, flat(x), scale.astype(jnp.float32)[None, None], None if gate is None else flat(gate))
    return y.reshape(x.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(settings: _Settings, x: Array, scale: Array, gate: Array | None) -> Array:
    """Of `[batch, rows, channels]`; `scale` is `[batch, 1, size]`."""
    kernel = _Kernel(_outputs, f"{settings.name}_forward", settings, results=1, sums=False)
    y: Array = joins_batch(functools.partial(_call, kernel))(x, scale, gate)[0]
    return y


def _forward(
    settings: _Settings, x: Array, scale: Array, gate: Array | None
) -> tuple[Array, tuple[Array, Array, Array | None]]:
    return _run(settings, x, scale, gate), (x, scale, gate)


def _backward(
    settings: _Settings, given: tuple[Array, Array, Array | None], d_y: Array
) -> tuple[Array, Array, Array | None]:
    x, scale, gate = given
    kernel = _Kernel(_cotangents, f"{settings.name}_backward", settings, results=1 if gate is None else 2, sums=True)
    d_x, *d_gate, d_scale = joins_batch(functools.partial(_call, kernel))(x, scale, gate, d_y)
    d_scale = jnp.sum(d_scale, (1, 2))[:, None]
    return d_x, d_scale, None if gate is None else d_gate[0].astype(gate.dtype)


_run.defvjp(_forward, _backward)


class _Kernel(NamedTuple):
    """A body with its name; it gives `results` arrays like the first, and sums over rows if asked."""

    body: Callable[..., None]
    name: str
    settings: _Settings
    results: int
    sums: bool


def _call(kernel: _Kernel, x: Array, scale: Array, *others: Array | None) -> list[Array]:
    """Runs a kernel over blocks of rows and of whole heads."""
    size = kernel.settings.size
    batch, rows, channels = x.shape
    width = _width(channels, size)
    most = max(16, _ROWS * _WIDTH // max(width, _WIDTH))
    whole = rows <= most and (rows % 8 == 0 or not kernel.sums)
    height = rows if whole else min(most, -(-rows // 16) * 16)
    padding = -rows % height
    padded = [None if a is None else jnp.pad(a, ((0, 0), (0, padding), (0, 0))) for a in (x, *others)]
    grid = (batch, channels // width, (rows + padding) // height)
    block = pl.BlockSpec((None, height, width), lambda b, c, r: (b, r, c))
    # A row of sums for every residue of eight: whole registers are added up, and no rows of one.
    of_sums = pl.BlockSpec((None, None, 8, size), lambda b, c, r: (b, c, 0, 0))
    shapes = [jax.ShapeDtypeStruct((batch, rows + padding, channels), x.dtype)] * kernel.results
    sums = [jax.ShapeDtypeStruct((*grid[:2], 8, size), jnp.float32)] * kernel.sums
    found = pl.pallas_call(
        functools.partial(kernel.body, kernel.settings, width // size),
        grid=grid,
        in_specs=[
            pl.BlockSpec((None, 1, size), lambda b, c, r: (b, 0, 0)),
            *(None if a is None else block for a in padded),
        ],
        out_specs=[block] * kernel.results + [of_sums] * kernel.sums,
        out_shape=shapes + sums,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=vmem_bytes()
        ),
        name=kernel.name,
    )(scale, *padded)
    return [y[:, :rows] for y in found[: kernel.results]] + list(found[kernel.results :])


def _outputs(settings: _Settings, heads: int, scale: Array, x: Array, gate: Array | None, y: Array) -> None:
    for h in range(heads):
        here = slice(h * settings.size, (h + 1) * settings.size)
        normal, _ = _normalised(settings, x[:, here].astype(jnp.float32))
        value = normal * scale[...]
        if gate is not None:
            value = value * _activated(settings.activation, gate[:, here].astype(jnp.float32))[0]
        if settings.keeps_nan:
            value = jnp.where(_lost(x[:, here]), jnp.nan, value)
        y[:, here] = value.astype(y.dtype)


def _cotangents(
    settings: _Settings, heads: int, scale: Array, x: Array, gate: Array | None, d_y: Array, *out: Array
) -> None:
    *found, d_scale = out

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        d_scale[...] = jnp.zeros(d_scale.shape, d_scale.dtype)

    for h in range(heads):
        here = slice(h * settings.size, (h + 1) * settings.size)
        normal, inverse = _normalised(settings, x[:, here].astype(jnp.float32))
        d_value = d_y[:, here].astype(jnp.float32)
        if settings.keeps_nan:
            d_value = jnp.where(_lost(x[:, here]), 0.0, d_value)
        if gate is not None:
            active, slope = _activated(settings.activation, gate[:, here].astype(jnp.float32))
            found[1][:, here] = (d_value * (normal * scale[...]) * slope).astype(found[1].dtype)
            d_value = d_value * active
        d_scale[...] += jnp.sum((d_value * normal).reshape(-1, 8, settings.size), 0)
        d_normal = d_value * scale[...]
        shared = jnp.mean(d_normal * normal, 1, keepdims=True)
        found[0][:, here] = ((d_normal - normal * shared) * inverse).astype(found[0].dtype)


def _normalised(settings: _Settings, x: Array) -> tuple[Array, Array]:
    """`x` over its root mean square, and one over that, for entries of any size.

    A power of two brings the largest entry between a half and one, so that squares neither overflow nor vanish.
    """
    x = jnp.where(jnp.abs(x) < jnp.inf, x, 0.0)
    root = root_of(settings.eps)
    power = power_below(jnp.maximum(jnp.max(jnp.abs(x), 1, keepdims=True), root))
    x = x * power
    rest = jax.lax.rsqrt(jnp.mean(x * x, 1, keepdims=True) + jnp.square(root * power))
    return x * rest, power * rest


def _lost(x: Array) -> Array:
    """Of which rows an entry is not finite, a column."""
    return jnp.max(jnp.where(jnp.abs(x.astype(jnp.float32)) < jnp.inf, 0.0, 1.0), 1, keepdims=True) > 0.0


def _activated(activation: str, x: Array) -> tuple[Array, Array]:
    """The activation and its derivative."""
    sigmoid = jax.nn.sigmoid(x)
    if activation == "sigmoid":
        return sigmoid, sigmoid * (1.0 - sigmoid)
    return x * sigmoid, sigmoid * (1.0 + x * (1.0 - sigmoid))


def _width(channels: int, size: int) -> int:
    """Channels of a grid step: whole heads on whole registers; 0 if there are none."""
    heads = channels // size
    counts = [n for n in range(1, heads + 1) if heads % n == 0 and n * size % TILE == 0 and n * size <= _WIDEST]
    return max((n for n in counts if n * size <= _WIDTH), default=min(counts, default=0)) * size
