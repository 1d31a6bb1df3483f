"""Products with weights, and rows of them, in the form that a TPU and its compiler are quick with."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Integer

from delta_jax.ops.device import platform

__all__ = ["ROWS", "embedded", "project"]

ROWS = 8  # of a register
_TABLE = 2**16  # rows of the largest table whose gradient is a product: of more, adding row to row takes less time


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


def embedded(embed: nnx.Embed, ids: Integer[Array, "*leading"]) -> Float[Array, "*leading features"]:
    """`embed(ids)`; on a TPU in bfloat16 the gradient of the table is a product.

    Its compiler makes a sort and an unrolled addition of rows of the usual gradient, which take it longer than a whole
    layer's kernels. The product adds in float32 and rounds once on every device.
    """
    if platform() != "tpu" or embed.dtype != jnp.bfloat16 or embed.num_embeddings > _TABLE:
        y: Array = embed(ids)
    else:
        y = _rows(embed.num_embeddings, embed.embedding[...].astype(embed.dtype), ids)
    return y


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rows(count: int, table: Array, ids: Array) -> Array:
    del count
    y: Array = jnp.take(table, ids, axis=0)
    return y


def _rows_forward(count: int, table: Array, ids: Array) -> tuple[Array, Array]:
    return _rows(count, table, ids), ids


def _rows_backward(count: int, ids: Array, d_y: Array) -> tuple[Array, None]:
    """What is not finite goes through the product as the largest number, or zero times it would reach all rows."""
    flat, ids = d_y.reshape(-1, d_y.shape[-1]), ids.reshape(-1).astype(jnp.int32)
    largest = float(jnp.finfo(d_y.dtype).max)
    flat = jnp.where(jnp.isfinite(flat), flat, jnp.asarray(largest, flat.dtype))
    mine = jnp.where(ids < 0, ids + count, ids)[:, None] == jnp.arange(count, dtype=jnp.int32)[None]
    total = jnp.einsum("tr,tc->rc", mine.astype(flat.dtype), flat)  # devices exchange what is rounded
    sound = jnp.abs(total) < jnp.asarray(0.5 * largest, total.dtype)
    return jnp.where(sound, total, jnp.asarray(jnp.nan, total.dtype)), None


_rows.defvjp(_rows_forward, _rows_backward)
