"""What several tasks draw, a row for each sequence, without a loop over sequences."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["at_least", "distinct", "first_uses", "one_of", "successive"]


def at_least(task: Any, **minima: int) -> None:
    """Refuses a task of which a field is below its minimum.

    Raises:
        ValueError: a field is too small; it names the field.
    """
    for name, minimum in minima.items():
        if getattr(task, name) < minimum:
            raise ValueError(f"{name} must be at least {minimum}, got {getattr(task, name)}")


def distinct(rng: np.random.Generator, rows: int, choices: int, size: int) -> np.ndarray:
    """[rows, size]: in every row different numbers below `choices` in random order, every such row equally likely.

    Floyd's algorithm: it costs rows * size^2, whatever the number of choices is.
    """
    drawn = np.empty((size, rows), np.int32)
    for place, largest in enumerate(range(choices - size, choices)):
        number = rng.integers(0, largest + 1, rows, np.int32)
        taken = (drawn[:place] == number).any(axis=0)
        drawn[place] = np.where(taken, largest, number)
    return rng.permuted(drawn, axis=0).T


def successive(rng: np.random.Generator, rows: int, weights: np.ndarray, size: int) -> np.ndarray:
    """[rows, size]: different numbers below len(weights), drawn one after the other with these weights (Plackett-Luce).

    The `size` largest of log(weights) + Gumbel noise, in descending order, have exactly that distribution.
    """
    scores = -(np.log(weights) + rng.gumbel(size=(rows, len(weights))))
    best = np.argpartition(scores, size - 1, axis=1)[:, :size]
    order = np.argsort(np.take_along_axis(scores, best, axis=1), axis=1)
    return np.take_along_axis(best, order, axis=1)


def first_uses(names: np.ndarray) -> np.ndarray:
    """[n, m]: the column at which each entry of `names` [n, m] appears first in its row."""
    order = np.argsort(names, axis=1, kind="stable")
    ordered = np.take_along_axis(names, order, axis=1)
    fresh = np.ones(names.shape, bool)
    fresh[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    starts = np.maximum.accumulate(np.where(fresh, np.arange(names.shape[1]), 0), axis=1)
    first = np.empty_like(order)
    np.put_along_axis(first, order, np.take_along_axis(order, starts, axis=1), axis=1)
    return first


def one_of(rng: np.random.Generator, allowed: np.ndarray) -> np.ndarray:
    """[n]: a column where `allowed` [n, m] is true, each equally likely; every row has one."""
    return np.where(allowed, rng.random(allowed.shape), -1.0).argmax(axis=1)
