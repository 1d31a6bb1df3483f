"""Products at full precision: float32 stays float32 on every device (a TPU or GPU would round to bfloat16 or TF32)."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from delta_jax.ops import device


def einsum(subscripts: str, *operands: Array, to: DTypeLike | None = None) -> Array:
    """A sum of products, accumulated in the operands' dtype.

    Args:
      subscripts: as `jnp.einsum` takes them.
      operands: arrays of one dtype.
      to: the dtype as precise as which the operands have to be; None is their own. To bfloat16 they are rounded. For
        float16, in which states overflow, a GPU takes TF32, as precise and of float32's range, and a TPU three products.
    """
    if to == jnp.bfloat16:
        rounded = (x.astype(jnp.bfloat16) for x in operands)
        return jnp.einsum(subscripts, *rounded, preferred_element_type=operands[0].dtype)
    precision = jax.lax.Precision.HIGH if to == jnp.float16 else jax.lax.Precision.HIGHEST
    return jnp.einsum(subscripts, *operands, precision=precision)


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
    """Swaps the last two axes; on a CPU writes the result out, where products are far slower on a folded transpose."""
    x = jnp.swapaxes(x, -1, -2)
    return x if device.accelerator() else jax.lax.optimization_barrier(x)


def varying_like(x: Array, *others: Array | None) -> Array:
    """Inside `jax.shard_map`, marks a loop's first carry as varying over the axes that its other inputs vary over."""

    def axes_of(array: Array) -> frozenset[str]:
        return jax.typeof(array).manual_axis_type.varying

    axes = frozenset().union(*(axes_of(other) for other in others if other is not None)) - axes_of(x)
    return jax.lax.pcast(x, tuple(sorted(axes)), to="varying") if axes else x
