"""Products at full precision: float32 stays float32 on every device (a TPU or GPU would round to bfloat16 or TF32)."""

import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def accumulator_dtype(dtype: DTypeLike) -> jnp.dtype:
    """The dtype of states, inverses and accumulations: float64 for float64 inputs, float32 for everything else."""
    return jnp.promote_types(dtype, jnp.float32)
