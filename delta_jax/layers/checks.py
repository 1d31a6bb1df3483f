"""Checks of what a layer is told and given; their messages name the argument and what was wanted."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from delta_jax.ops.arguments import DTYPES

__all__ = [
    "require_cache",
    "require_counts",
    "require_dtypes",
    "require_flags",
    "require_positive_integers",
    "require_positive_integers_or_none",
    "require_positive_numbers",
    "require_rngs",
]


def require_positive_integers(**numbers: Any) -> None:
    """Raises a ValueError if one is not a positive integer."""
    for name, number in numbers.items():
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise ValueError(f"{name} must be a positive integer, got {number!r}")


def require_positive_integers_or_none(**numbers: Any) -> None:
    """Raises a ValueError if one is neither a positive integer nor None."""
    require_positive_integers(**{name: number for name, number in numbers.items() if number is not None})


def require_counts(**numbers: Any) -> None:
    """Raises a ValueError if one is not an integer from zero on."""
    for name, number in numbers.items():
        if not isinstance(number, int) or isinstance(number, bool) or number < 0:
            raise ValueError(f"{name} must be a positive integer or 0, got {number!r}")


def require_positive_numbers(**numbers: Any) -> None:
    """Raises a ValueError if one is not a positive number, or not a finite one."""
    for name, number in numbers.items():
        if not isinstance(number, int | float) or isinstance(number, bool) or not 0 < number < math.inf:
            raise ValueError(f"{name} must be a positive number, got {number!r}")


def require_flags(**flags: Any) -> None:
    """Raises a ValueError if one is not a boolean."""
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise ValueError(f"{name} must be true or false, got {flag!r}")


def require_dtypes(**dtypes: Any) -> None:
    """Raises a ValueError if one does not name a dtype that the layers compute in; strings that do are fine."""
    for name, dtype in dtypes.items():
        try:
            known = dtype is not None and jnp.dtype(dtype).name in DTYPES
        except TypeError:
            known = False
        if not known:
            raise ValueError(f"{name} must be one of the dtypes {', '.join(DTYPES)}, got {dtype!r}")


def require_rngs(rngs: Any) -> None:
    """Raises a ValueError if these are not the streams of random numbers that initial parameters come from."""
    if not isinstance(rngs, nnx.Rngs):
        raise ValueError(f"rngs must be nnx.Rngs, such as nnx.Rngs(0), got {type(rngs).__name__}")


def require_cache(cache: Any, batch_size: Any, init_cache: Callable[..., Any]) -> None:
    """Raises a ValueError if this is not a cache of so many sequences, as `init_cache` makes it for some length."""
    short, long = (
        jax.eval_shape(lambda length=length: init_cache(batch_size, length=length)) for length in (1, 2)
    )  # they differ in the sizes that depend on the length, which are free
    whose = f"cache must be one of this layer's for {batch_size} sequences, as init_cache makes it"
    form: Any = jax.tree.structure(cache)
    if form != jax.tree.structure(short):
        raise ValueError(f"{whose}, got {_kind(cache)} where {_kind(short)} is wanted")
    leaves = zip(jax.tree.leaves_with_path(cache), jax.tree.leaves(short), jax.tree.leaves(long), strict=True)
    for (path, leaf), like, longer in leaves:
        shape, dtype = getattr(leaf, "shape", ()), getattr(leaf, "dtype", type(leaf).__name__)
        sizes = zip(shape, like.shape, longer.shape, strict=False)
        same = len(shape) == len(like.shape) and all(size == one for size, one, other in sizes if one == other)
        if not same or dtype != like.dtype:
            name = jax.tree_util.keystr(path).lstrip(".")
            raise ValueError(
                f"{whose}, got {name} of shape {shape} and dtype {dtype} where {like.shape} and {like.dtype} are wanted"
            )


def _kind(cache: Any) -> str:
    return f"{type(cache).__name__} of {len(jax.tree.leaves(cache))} arrays"
