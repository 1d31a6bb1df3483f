"""Functions of sequences and heads over the axes of a mesh that types speak of: explicit ones, and those of `jax.shard_map`.

Sequences and heads do not meet in what this package computes. Where the type of an argument is cut over explicit mesh axes
(`jax.make_mesh` makes such axes by default), every device runs the function on its own sequences and heads, and other
axes are gathered first, with a warning where they are sequences or heads that the mesh could cut but for a number that
does not divide. Inside `jax.shard_map` an argument may be the same on every device of an axis over which another
varies; all are marked as varying before anything is computed, which is also where the cotangents of such an
argument are summed.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import Array
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from delta_jax.ops.precision import varying_like

_CALLED = {"batch": "sequences", "heads": "heads or channels"}
Axes = tuple[str | None, ...]  # what the axes of an array are: "batch" and "heads" are cut, the others are not


def by_parts(
    function: Callable[..., Any],
    arrays: Sequence[Array | None],
    axes: Sequence[Axes],
    results: Sequence[Axes],
    *,
    kernels: bool = False,
) -> Any:
    """`function(*arrays)`, every part of sequences and heads where it lies.

    Args:
      function: of arrays, or None in their place, to a tuple of arrays; parts must not depend on each other.
      arrays: its arguments.
      axes: what the axes of each are; an array may have fewer.
      results: likewise of what it returns.
      kernels: whether it calls Pallas kernels, which do not say along which axes their results vary.

    Returns:
      What the function returns, cut like the arguments.
    """
    mesh = explicit_mesh(arrays)
    if mesh is None:
        return function(*_varying_alike(arrays))
    found = _cut_of(arrays, axes, mesh)

    def spec(names: Axes) -> PartitionSpec:
        return PartitionSpec(*(found.get(name) if name else None for name in names))

    def local(*given: Array) -> Any:
        rest = iter(given)
        return function(*_varying_alike([None if x is None else next(rest) for x in arrays]))

    given = [(x, spec(names[: x.ndim])) for x, names in zip(arrays, axes, strict=True) if x is not None]
    whole = [jax.sharding.reshard(x, NamedSharding(mesh, s)) for x, s in given]
    out = tuple(map(spec, results))
    if not found and not kernels:  # whatever else is cut, such as what `jax.vmap` hides, is left to the compiler
        shardings = tuple(NamedSharding(mesh, s) for s in out)
        return jax.sharding.auto_axes(local, axes=mesh.explicit_axes, out_sharding=shardings)(*whole)
    cut = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=tuple(s for _, s in given),
        out_specs=out,
        axis_names=set(mesh.explicit_axes),
        check_vma=not kernels,
    )
    return cut(*whole)


def explicit_mesh(arrays: Sequence[Array | None]) -> AbstractMesh | None:
    """The mesh of the types of the arrays, if they have one with explicit axes."""
    meshes = (jax.typeof(x).sharding.mesh for x in arrays if x is not None)
    return next((mesh for mesh in meshes if mesh.explicit_axes), None)


def axes_of(x: Array, axis: int) -> tuple[str, ...]:
    """The explicit mesh axes over which an axis of an array is cut."""
    here = jax.typeof(x).sharding.spec[axis] or ()
    return (here,) if isinstance(here, str) else tuple(here)


def _cut_of(arrays: Sequence[Array | None], axes: Sequence[Axes], mesh: AbstractMesh) -> dict[str, tuple[str, ...]]:
    """The mesh axes that cut sequences and heads: those of the first array that is cut there, if they divide all.

    Where they do not, as of fewer key heads than devices, all are gathered: the same numbers, but slower, which a warning
    says.
    """
    found: dict[str, tuple[str, ...]] = {}
    used: set[str] = set()
    for name in ("batch", "heads"):
        sizes = set()
        for x, names in zip(arrays, axes, strict=True):
            if x is None or name not in names:
                continue
            axis = names.index(name)
            sizes.add(x.shape[axis])
            here = axes_of(x, axis)
            if name not in found and here and not used & set(here):
                found[name] = here
        parts = math.prod(mesh.shape[axis] for axis in found.get(name, ()))
        if any(size % parts for size in sizes):
            over = " x ".join(f"{axis}={mesh.shape[axis]}" for axis in found.pop(name))
            warnings.warn(
                f"{_CALLED[name]} are cut into {parts} parts ({over}), which does not divide each of "
                f"{', '.join(map(str, sorted(sizes)))}: all are gathered, and every device computes all of them.",
                stacklevel=1,
            )
        used |= set(found.get(name, ()))
    return found


def _varying_alike(arrays: Sequence[Array | None]) -> list[Array | None]:
    """The arrays, each marked as varying over every axis of `jax.shard_map` over which one of them varies."""
    return [None if x is None else varying_like(x, *arrays) for x in arrays]
