"""`jax.vmap` of the kernels: the mapped axis joins the batch, so that a kernel always sees the grid it was written for."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array


def joins_batch(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of trees of arrays whose first axis is the batch, and the same of its results, as one vmap maps well."""
    mapped = jax.custom_batching.custom_vmap(function)

    @mapped.def_vmap
    def _(size: int, batched: Any, *arguments: Any) -> tuple[Any, Any]:
        def join(x: Array, is_batched: bool) -> Array:
            x = x if is_batched else jnp.broadcast_to(x[None], (size, *x.shape))
            return x.reshape(-1, *x.shape[2:])

        results = mapped(*jax.tree.map(join, arguments, tuple(batched)))
        results = jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), results)
        return results, jax.tree.map(lambda x: True, results)

    return mapped


def one_by_one(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of trees of arrays which `jax.vmap` calls for one entry after the other."""
    mapped = jax.custom_batching.custom_vmap(function)

    @mapped.def_vmap
    def _(size: int, batched: Any, *arguments: Any) -> tuple[Any, Any]:
        def each(x: Array, is_batched: bool) -> Array:
            return x if is_batched else jnp.broadcast_to(x[None], (size, *x.shape))

        given = jax.tree.map(each, arguments, tuple(batched))
        results = jax.lax.map(lambda one: mapped(*one), given)
        return results, jax.tree.map(lambda x: True, results)

    return mapped
