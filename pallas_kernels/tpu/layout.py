"""Where arrays lie: XLA chooses layouts for everything but the arguments and results of a kernel."""

from typing import Any

import jax
from jax import Array
from jax.experimental import pallas as pl


def as_they_lie[Tree](arrays: Tree) -> Tree:
    """The same arrays, in the layout of kernels: what passes through is not laid out otherwise before it or after.

    A kernel that does nothing, on memory where it is; a layout constraint of JAX would say the same, but is not exported.
    """
    leaves, structure = jax.tree.flatten(arrays)
    same: Tree = jax.tree.unflatten(structure, lying(*leaves))
    return same


@jax.custom_batching.custom_vmap
def lying(*arrays: Array) -> tuple[Array, ...]:
    """`as_they_lie` of several arrays."""
    where = [pl.BlockSpec(memory_space=pl.ANY)] * len(arrays)
    result = pl.pallas_call(
        _nothing,
        in_specs=where,
        out_specs=where,
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays],
        input_output_aliases={n: n for n in range(len(arrays))},
        name="as_they_lie",
    )(*arrays)
    return tuple(result)


@lying.def_vmap
def _(size: int, batched: Any, *arrays: Array) -> tuple[tuple[Array, ...], tuple[bool, ...]]:
    """Nothing depends on the axes."""
    del size
    return lying(*arrays), tuple(batched)


def _nothing(*_: Array) -> None: ...
