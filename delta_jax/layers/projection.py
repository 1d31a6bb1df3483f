"""Products with weights, of which a TPU should read no more than it must."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from delta_jax.ops.device import platform

__all__ = ["ROWS", "project"]

ROWS = 8  # of a register


def project(
    x: Float[Array, "*leading inputs"], kernel: Float[Array, "inputs outputs"], dimensions: Any, **options: Any
) -> Float[Array, "*leading outputs"]:
    """`jax.lax.dot_general` for `nnx.Linear`: the last axis of x with the first of the kernel.

    For a TPU the rows of x, where they are fewer than a register's, are filled up with zeros: of a matrix with that many
    the compiler makes a product that reads the kernel as fast as memory gives it, of fewer a loop that takes thrice as
    long.
    """
    rows = math.prod(x.shape[:-1])
    if platform() != "tpu" or not isinstance(rows, int) or rows >= ROWS:
        y: Array = jax.lax.dot_general(x, kernel, dimensions, **options)
        return y
    filled = jnp.pad(x.reshape(rows, -1), ((0, ROWS - rows), (0, 0)))
    y = jax.lax.dot_general(filled, kernel, (((1,), (0,)), ((), ())), **options)
    return y[:rows].reshape(*x.shape[:-1], -1)
