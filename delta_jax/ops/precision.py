"""Products at full precision: float32 stays float32 on every device (a TPU or GPU would round to bfloat16 or TF32)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def accumulator_dtype(dtype: DTypeLike) -> jnp.dtype:
    """The dtype of states, inverses and accumulations: float64 for float64 inputs, float32 for everything else."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def constant(x: np.ndarray, like: Array) -> Array:
    """A small constant with as many axes as `like`, in its dtype unless it is a mask: nothing broadcasts silently."""
    x = x.reshape((1,) * (like.ndim - x.ndim) + x.shape)
    return jnp.asarray(x, x.dtype if x.dtype == bool else like.dtype)


def masked(mask: np.ndarray, x: Array) -> Array:
    """`x` where the mask holds, zero elsewhere."""
    return jnp.where(constant(mask, x), x, jnp.zeros((), x.dtype))


def transposed(x: Array) -> Array:
    """Swaps the last two axes and writes the result out: XLA's CPU products are far slower on a folded transpose."""
    return jax.lax.optimization_barrier(jnp.swapaxes(x, -1, -2))


def varying_like(x: Array, *others: Array | None) -> Array:
    """Inside `jax.shard_map`, marks a loop's first carry as varying over the axes that its other inputs vary over."""

    def axes_of(array: Array) -> frozenset[str]:
        return jax.typeof(array).manual_axis_type.varying

    axes = frozenset().union(*(axes_of(other) for other in others if other is not None)) - axes_of(x)
    return jax.lax.pcast(x, tuple(sorted(axes)), to="varying") if axes else x
