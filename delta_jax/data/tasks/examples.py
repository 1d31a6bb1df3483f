"""What a synthetic task hands out, and how train and test are kept apart."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np

__all__ = ["IGNORED", "Examples", "Split", "Task", "draw", "identities"]

IGNORED = -1
"""The target of a position at which nothing is asked."""

TEST_SHARE = 16
"""One sequence in so many belongs to the test split."""

_AT_ONCE = 1024
"""Sequences sampled at once: noisy ones take hundreds of kilobytes each, and all but a few are thrown away."""

Split = Literal["train", "test"]
_SPLITS = ("train", "test")


class Examples(NamedTuple):
    """Sequences with their answers, as numpy arrays.

    Attributes:
        inputs: [n, T] int32 token ids; or [n, T, m] float32, weights over the first m tokens (noisy observations), the
            others having none.
        targets: [n, T] int32, the token to be predicted at each position (already shifted: a language model reads
            inputs[:, t] and answers targets[:, t]), `IGNORED` where nothing is asked.
        legal: [n, T, vocab] bool, every answer that counts as right; None where only the target does.
        answers: [n, T] int32; positions of one sequence that share a number give one answer together, the sum of
            their probabilities, and count once. None where every position answers for itself.
        identity: [n] uint64, what decides the split; None is a hash of the inputs.

    Examples:
        >>> examples = draw(Parity(lengths=(8, 8)), 5, split="train", seed=0)
        >>> examples.take(slice(2)).inputs.shape
        (2, 7)
    """

    inputs: np.ndarray
    targets: np.ndarray
    legal: np.ndarray | None = None
    answers: np.ndarray | None = None
    identity: np.ndarray | None = None

    def take(self, rows: Any) -> Examples:
        """Some of the sequences, by an index, a slice or a mask."""
        chosen: dict[str, Any] = {name: None if x is None else x[rows] for name, x in self._asdict().items()}
        return Examples(**chosen)


@runtime_checkable
class Task(Protocol):
    """A distribution of sequences; a frozen dataclass whose fields are the task's parameters."""

    @property
    def vocab_size(self) -> int:
        """Token ids are below it, those of targets too."""

    @property
    def length(self) -> int:
        """T of its arrays."""

    @property
    def chance(self) -> float:
        """Expected accuracy of a guess that knows only which answers are possible at all."""

    def sample(self, rng: np.random.Generator, number: int, split: Split) -> Examples:
        """`number` independent sequences; the split matters where a benchmark asks other things at test time."""


def draw(task: Task, number: int, *, split: Split, seed: int | tuple[int, ...]) -> Examples:
    """Sequences of one split: no sequence can ever appear in both.

    Which split a sequence belongs to is decided by a hash of itself (`Examples.identity`), so that splits are disjoint for
    all seeds, numbers and orders; sequences of the other split are thrown away, which leaves the distribution of each
    as it was.

    Args:
        task: what to draw from.
        number: how many.
        split: "train" or "test", a sixteenth of all sequences.
        seed: one number or several; the same give the same sequences.

    Returns:
        Exactly `number` sequences.

    Raises:
        ValueError: the split is neither, the number is not positive, or the task has too few sequences for this split.

    Examples:
        >>> task = Parity(lengths=(16, 16))
        >>> train = draw(task, 4, split="train", seed=0)
        >>> train.inputs.shape
        (4, 15)
        >>> bool((train.inputs == draw(task, 4, split="train", seed=0).inputs).all())
        True
    """
    if split not in _SPLITS:
        raise ValueError(f"split must be one of {', '.join(_SPLITS)}, got {split!r}")
    if number < 1:
        raise ValueError(f"number must be positive, got {number}")
    rng = np.random.default_rng([_SPLITS.index(split), *np.atleast_1d(seed)])
    parts: list[Examples] = []
    found, drawn = 0, 0
    while found < number:
        share = TEST_SHARE if split == "test" else TEST_SHARE / (TEST_SHARE - 1)
        size = min(int(1.1 * (number - found) * share) + 8, _AT_ONCE)
        sample = task.sample(rng, size, split)
        here = (identities(sample) % np.uint64(TEST_SHARE) == 0) == (split == "test")
        parts.append(sample.take(here).take(slice(number - found)))
        found, drawn = found + len(parts[-1].inputs), drawn + size
        if drawn > 100 * share * (number + 100):
            raise ValueError(f"{task} has too few sequences: {found} of {number} found for the {split} split")
    joined: dict[str, Any] = {
        name: None if getattr(parts[0], name) is None else np.concatenate([getattr(part, name) for part in parts])
        for name in Examples._fields
    }
    return Examples(**joined)


def identities(examples: Examples) -> np.ndarray:
    """[n] uint64: `examples.identity`, or a hash of the inputs of each sequence.

    Examples:
        >>> task = Parity(lengths=(16, 16))
        >>> train, test = (draw(task, 50, split=split, seed=0) for split in ("train", "test"))
        >>> set(identities(train)).isdisjoint(identities(test))
        True
    """
    if examples.identity is not None:
        return examples.identity
    rows = np.ascontiguousarray(examples.inputs).reshape(len(examples.inputs), -1)
    return hash_rows(rows.view(np.uint32))


def hash_rows(rows: np.ndarray) -> np.ndarray:
    """A 64-bit hash of every row of an integer array [n, m]; rows of different lengths hash differently."""
    with np.errstate(over="ignore"):
        hashed = np.full(len(rows), 0x9E3779B97F4A7C15 * (rows.shape[1] + 1) % 2**64, np.uint64)
        for column in rows.T:
            hashed = (hashed ^ column.astype(np.uint64)) * np.uint64(0x100000001B3)
            hashed ^= hashed >> np.uint64(29)
        hashed *= np.uint64(0xBF58476D1CE4E5B9)
    return hashed ^ (hashed >> np.uint64(32))
