"""The three synthetic tasks of the Kimi Linear report: palindrome, multi-query recall without fillers, stacks.

The report states lengths (256 to 2048) and that there are 64 stacks, but no vocabularies, no number of pairs and no rule
for the operations; those are choices of this file. Source: Kimi team, "Kimi Linear" (2025), section 5.1 and figure 4.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from delta_jax.config import check_fields
from delta_jax.data.tasks.draws import at_least, distinct, one_of
from delta_jax.data.tasks.examples import IGNORED, Examples, Split

__all__ = ["MultiQueryRecall", "Palindrome", "Stacks"]


@dataclass(frozen=True, kw_only=True)
class Palindrome:
    """A sequence of tokens, then the same backwards.

    A sequence is `x1 ... xn SEPARATOR xn ... x2`, n = length / 2, with the target x(i-1) at the second xi: the first token
    of the mirrored part is given, as in the report, the n - 1 others are asked for. SEPARATOR is token 0, the others are
    drawn uniformly with replacement.

    Attributes:
        length: tokens of a sequence; even.
        vocab_size: tokens, SEPARATOR among them.

    Examples:
        >>> examples = draw(Palindrome(length=8), 2, split="train", seed=0)
        >>> bool((examples.inputs[:, 1:4] == examples.inputs[:, :4:-1]).all())  # backwards, but for the last
        True
    """

    length: int = 256
    vocab_size: int = 128

    def __post_init__(self) -> None:
        check_fields(self)
        at_least(self, length=4, vocab_size=3)
        if self.length % 2:
            raise ValueError(f"length must be even, got {self.length}")

    @property
    def chance(self) -> float:
        return 1 / (self.vocab_size - 1)

    def sample(self, rng: np.random.Generator, number: int, split: Split) -> Examples:
        half = self.length // 2
        tokens = rng.integers(1, self.vocab_size, (number, half), np.int32)
        separator = np.zeros((number, 1), np.int32)
        inputs = np.concatenate([tokens, separator, tokens[:, :0:-1]], axis=1)
        targets = np.full(inputs.shape, IGNORED, np.int32)
        targets[:, half + 1 :] = tokens[:, -2::-1]
        return Examples(inputs, targets)


@dataclass(frozen=True, kw_only=True)
class MultiQueryRecall:
    """Keys with their values, then a dense list of questions.

    A sequence is `k1 v1 ... kP vP SEPARATOR q1 ... qQ` with the target at each query the value of that key. Keys differ,
    values need not; queries are different keys in random order. SEPARATOR is token 0, keys are 1 to K and values K + 1
    to vocab_size - 1, K = vocab_size // 2 - 1. (`MQAR` is Zoology's task, with fillers between queries.)

    Attributes:
        pairs: P.
        queries: Q, at most P.
        vocab_size: tokens, SEPARATOR among them.

    Examples:
        >>> draw(MultiQueryRecall(pairs=4, queries=3, vocab_size=32), 2, split="train", seed=0).inputs.shape
        (2, 12)
    """

    pairs: int = 85
    queries: int = 85
    vocab_size: int = 2048

    def __post_init__(self) -> None:
        check_fields(self)
        at_least(self, pairs=1, queries=1)
        if self.queries > self.pairs:
            raise ValueError(f"queries must be at most pairs, {self.pairs}, got {self.queries}")
        if self._first_value - 1 < self.pairs:
            raise ValueError(f"vocab_size must be at least 2 * pairs + 2 = {2 * self.pairs + 2}, got {self.vocab_size}")

    @property
    def _first_value(self) -> int:
        return self.vocab_size // 2

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return 2 * self.pairs + 1 + self.queries

    @property
    def chance(self) -> float:
        return 1 / (self.vocab_size - self._first_value)

    def sample(self, rng: np.random.Generator, number: int, split: Split) -> Examples:
        keys = 1 + distinct(rng, number, self._first_value - 1, self.pairs)
        values = rng.integers(self._first_value, self.vocab_size, keys.shape)
        order = distinct(rng, number, self.pairs, self.queries)
        inputs = np.zeros((number, self.length), np.int32)
        inputs[:, : 2 * self.pairs] = np.stack([keys, values], axis=2).reshape(number, -1)
        inputs[:, 2 * self.pairs + 1 :] = np.take_along_axis(keys, order, axis=1)
        targets = np.full(inputs.shape, IGNORED, np.int32)
        targets[:, 2 * self.pairs + 1 :] = np.take_along_axis(values, order, axis=1)
        return Examples(inputs, targets)


@dataclass(frozen=True, kw_only=True)
class Stacks:
    """Many stacks, pushed to and popped from in turn: which element comes off?

    A sequence is a list of operations of three tokens, `PUSH stack element` or `POP stack element`; the target at the
    stack of a POP is the element, the last one pushed to that stack and not popped yet. Every operation takes a stack at
    random, pushes to it if it is empty and else pops with probability `pops`; the last operation pops, if any stack holds
    something, so that every sequence has a target. Elements are drawn uniformly. PUSH is token 0, POP 1, the stacks
    follow, then the elements.

    Attributes:
        operations: how many; a sequence has three tokens for each.
        stacks: how many.
        elements: how many different ones.
        pops: probability that a stack that is not empty is popped.

    Examples:
        >>> draw(Stacks(operations=5, stacks=2, elements=4), 2, split="train", seed=0).inputs.shape
        (2, 15)
    """

    operations: int = 85
    stacks: int = 64
    elements: int = 64
    pops: float = 0.5

    def __post_init__(self) -> None:
        check_fields(self)
        at_least(self, operations=2, stacks=1, elements=2)
        if not 0 < self.pops <= 1:
            raise ValueError(f"pops must be in (0, 1], got {self.pops}")

    @property
    def vocab_size(self) -> int:
        return 2 + self.stacks + self.elements

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return 3 * self.operations

    @property
    def chance(self) -> float:
        return 1 / self.elements

    def sample(self, rng: np.random.Generator, number: int, split: Split) -> Examples:
        rows = np.arange(number)
        stack = rng.integers(0, self.stacks, (number, self.operations))
        element = rng.integers(2 + self.stacks, self.vocab_size, stack.shape)
        popped = rng.random(stack.shape) < self.pops
        popped[:, -1] = True
        top = np.full((number, self.stacks), -1)  # the operation that pushed what is on top of each stack
        below = np.full(stack.shape, -1)  # the operation that pushed what was on top when this one pushed
        for step in range(self.operations):
            if step == self.operations - 1:
                full = top >= 0
                stack[:, step] = np.where(full.any(axis=1), one_of(rng, full), stack[:, step])
            on_top = top[rows, stack[:, step]]
            pop = popped[:, step] = popped[:, step] & (on_top >= 0)
            element[:, step] = np.where(pop, element[rows, on_top], element[:, step])
            below[:, step] = on_top
            top[rows, stack[:, step]] = np.where(pop, below[rows, on_top], step)
        inputs = np.stack([popped, 2 + stack, element], axis=2).reshape(number, -1).astype(np.int32)
        targets = np.full((*stack.shape, 3), IGNORED, np.int32)
        targets[..., 1] = np.where(popped, element, IGNORED)
        return Examples(inputs, targets.reshape(number, -1))
