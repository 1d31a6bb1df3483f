"""Multi-query associative recall (MQAR), with keys that may be overwritten."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from delta_jax.config import check_fields
from delta_jax.data.tasks.draws import at_least, distinct, successive
from delta_jax.data.tasks.examples import IGNORED, Examples, Split

__all__ = ["MQAR"]

_BENCHMARK_VOCABULARY = 8192


@dataclass(frozen=True, kw_only=True)
class MQAR:
    """Keys with their values, then the keys again at random places: at each, what was the value?

    A sequence is `k1 v1 k2 v2 ... kK vK`, then slots of two tokens. A query is a key at the start of a slot, its target
    there the value that the key had last; the token after it is filler, not the value. Query i is in slot g_i, drawn
    without replacement with p(g) ~ power * (g + 1) ** (power - 1): most queries come right after the pairs. With
    `updates`, so many of the keys follow the pairs once more with another value each (the forgetting variant; 4 there).

    Token 0 is the blank; keys are 1 to S/2 - 1 and values S/2 to S - 1, S = vocab_size - filler_tokens. Keys differ
    within a sequence, as do the values of the first pairs. `random_non_queries` puts a random token in the place of
    every blank. That may be any token, a key of the sequence too, which then gets a new value: rare among 8192 tokens,
    but among 256 it caps accuracy near 0.95, and lower for models that overwrite. A smaller vocabulary is therefore
    refused with `random_non_queries`, unless fillers have tokens of their own.

    Attributes:
        vocab_size: tokens, all kinds together.
        length: tokens of a sequence; even.
        pairs: different keys, each asked for once.
        power: of the law of the slots; nearer 0 is steeper, 1 is uniform.
        passes: how often the pairs (and updates) are shown before the queries.
        updates: keys that get another value after the pairs.
        random_non_queries: random tokens between queries, not blanks.
        filler_tokens: so many tokens at the end of the vocabulary are fillers only; 0 takes fillers from all tokens.

    Source: Arora et al., "Zoology" (2023), section 4 and appendix; the forgetting variant and `passes` are of its code.

    Examples:
        >>> examples = draw(MQAR(vocab_size=256, length=64, pairs=4, random_non_queries=False), 3, split="train", seed=0)
        >>> examples.inputs.shape, int((examples.targets[0] != IGNORED).sum())
        ((3, 64), 4)
    """

    vocab_size: int = _BENCHMARK_VOCABULARY
    length: int = 64
    pairs: int = 4
    power: float = 0.01
    passes: int = 1
    updates: int = 0
    random_non_queries: bool = True
    filler_tokens: int = 0

    def __post_init__(self) -> None:
        check_fields(self)
        at_least(self, vocab_size=4, pairs=1, passes=1, updates=0, filler_tokens=0)
        if self.power <= 0:
            raise ValueError(f"power must be positive, got {self.power}")
        if self.length % 2:
            raise ValueError(f"length must be even, got {self.length}")
        if self.updates > self.pairs:
            raise ValueError(f"updates must be at most pairs, {self.pairs}, got {self.updates}")
        if self._slots < self.pairs:
            needed = self._context + 2 * self.pairs
            raise ValueError(
                f"length must be at least {needed} for {self.pairs} pairs and their queries, got {self.length}"
            )
        if self._first_value - 1 < self.pairs:
            raise ValueError(f"vocab_size must leave a key for each of {self.pairs} pairs, got {self.vocab_size}")
        if self.random_non_queries and not self.filler_tokens and self.vocab_size < _BENCHMARK_VOCABULARY:
            raise ValueError(
                f"random_non_queries needs filler_tokens where vocab_size is below {_BENCHMARK_VOCABULARY}, "
                f"got vocab_size {self.vocab_size}: fillers would often be keys of the sequence"
            )

    @property
    def _context(self) -> int:
        return 2 * (self.pairs + self.updates) * self.passes

    @property
    def _slots(self) -> int:
        return (self.length - self._context) // 2

    @property
    def _symbols(self) -> int:
        return self.vocab_size - self.filler_tokens

    @property
    def _first_value(self) -> int:
        return self._symbols // 2

    @property
    def chance(self) -> float:
        return 1 / (self._symbols - self._first_value)

    def sample(self, rng: np.random.Generator, number: int, split: Split) -> Examples:
        choices = self._symbols - self._first_value
        keys = 1 + distinct(rng, number, self._first_value - 1, self.pairs)
        old = distinct(rng, number, choices, self.pairs)
        again = distinct(rng, number, self.pairs, self.updates)
        new = (np.take_along_axis(old, again, axis=1) + rng.integers(1, choices, again.shape)) % choices
        last = old.copy()
        np.put_along_axis(last, again, new, axis=1)
        shown = np.concatenate([keys, np.take_along_axis(keys, again, axis=1)], axis=1)
        values = self._first_value + np.concatenate([old, new], axis=1)

        inputs = np.zeros((number, self.length), np.int32)
        targets = np.full(inputs.shape, IGNORED, np.int32)
        inputs[:, : self._context] = np.tile(np.stack([shown, values], axis=2).reshape(number, -1), self.passes)
        weights = np.arange(1.0, self._slots + 1) ** (self.power - 1)
        asked = self._context + 2 * successive(rng, number, weights, self.pairs)
        np.put_along_axis(inputs, asked, keys, axis=1)
        np.put_along_axis(targets, asked, self._first_value + last, axis=1)
        if self.random_non_queries:
            blank = inputs == 0
            lowest = self._symbols if self.filler_tokens else 0
            inputs[blank] = rng.integers(lowest, self.vocab_size, int(blank.sum()))
        return Examples(inputs, targets)
