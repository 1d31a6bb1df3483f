"""What tasks of state tracking share: ranges as parameters, choices row by row, identities that ignore padding."""

from __future__ import annotations

import numpy as np

from delta_jax.data.tasks.examples import hash_rows

__all__ = ["check_range", "distinct", "identity_of_padded", "mix", "pick", "uniform"]

Range = tuple[int, int]
"""Smallest and largest value, both included."""


def check_range(name: str, values: Range, least: int, most: int | None = None) -> None:
    """ValueError unless `least <= values[0] <= values[1] <= most`."""
    low, high = values
    if not least <= low <= high or (most is not None and high > most):
        above = "" if most is None else f" and at most {most}"
        raise ValueError(f"{name} must be (smallest, largest), each at least {least}{above}, got {values}")


def uniform(rng: np.random.Generator, values: Range, shape: int | tuple[int, ...]) -> np.ndarray:
    """Integers of the range, all equally likely."""
    return rng.integers(values[0], values[1] + 1, shape)


def pick(rng: np.random.Generator, weights: np.ndarray) -> np.ndarray:
    """One index of the last axis for each row, drawn in proportion to its non-negative weights [..., m]."""
    below = np.cumsum(weights, axis=-1)
    # In (0, sum], so that an index of weight 0 is never drawn.
    level = (1 - rng.random(below.shape[:-1])) * below[..., -1]
    return np.argmax(below >= level[..., None], axis=-1)


def distinct(rng: np.random.Generator, allowed: np.ndarray, count: int) -> np.ndarray:
    """`count` different indices of the last axis for each row, in random order, the allowed ones [..., m] first."""
    keys = rng.random(allowed.shape)
    keys[~allowed] += 1
    return np.argsort(keys, axis=-1)[..., :count]


def mix(values: np.ndarray) -> np.ndarray:
    """uint64 scrambled to uint64, one to one (the finaliser of SplitMix64)."""
    with np.errstate(over="ignore"):
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def identity_of_padded(tokens: np.ndarray) -> np.ndarray:
    """[n] uint64: a hash of token ids [n, T] that is the same with more columns of zeros on the right.

    So a sequence is in the same split whatever the longest length of the task that drew it.
    """
    weights = mix(np.arange(1, tokens.shape[1] + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    with np.errstate(over="ignore"):
        sums = mix(tokens.astype(np.uint64) + np.uint64(1)) - mix(np.ones(1, np.uint64))
        sums = (sums * (weights | np.uint64(1))).sum(axis=1, dtype=np.uint64)
    return hash_rows(sums[:, None].view(np.uint32))
