"""Parity and modular arithmetic: formal languages of which only the end of a word is asked."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from delta_jax.config import check_fields
from delta_jax.data.tasks.draws import at_least
from delta_jax.data.tasks.examples import IGNORED, Examples, Split
from delta_jax.data.tasks.rows import Range, check_range, identity_of_padded, uniform

__all__ = ["BracketedArithmetic", "ModularArithmetic", "Parity"]

_PAD, _PLUS, _MINUS, _TIMES, _EQUALS, _ZERO = range(6)


@dataclass(frozen=True, kw_only=True)
class _Words:
    """Words of several lengths, padded with token 0; a length counts the answer, which is not part of the inputs."""

    lengths: Range = (3, 40)

    @property
    def length(self) -> int:
        """Positions of the inputs: the largest length less the answer."""
        return self.lengths[1] - 1


@dataclass(frozen=True, kw_only=True)
class Parity(_Words):
    """Whether the number of ones among the bits read is odd.

    Layout: L - 1 random bits as tokens 1 (zero) and 2 (one), then padding (token 0). The answer, 1 for even and 2 for odd,
    is asked at the last bit.

    Short words are few: those of one length may all belong to one split (`draw`).

    Attributes:
        lengths: smallest and largest L, in tokens with the answer, all equally likely. The paper tests on (40, 256).
        every_token: ask for the parity so far at every bit.

    Source: Grazzi et al., Unlocking State-Tracking in Linear RNNs Through Negative Eigenvalues, section 5.1 and
    appendix E.1.

    Examples:
        >>> examples = draw(Parity(lengths=(12, 12), every_token=True), 3, split="train", seed=0)
        >>> ones = np.cumsum(examples.inputs == 2, axis=1)
        >>> bool((examples.targets == 1 + ones % 2).all())
        True
    """

    every_token: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        check_range("lengths", self.lengths, 2)

    @property
    def vocab_size(self) -> int:
        """Padding and two bits."""
        return 3

    @property
    def chance(self) -> float:
        """Of a coin."""
        return 0.5

    def sample(self, rng: np.random.Generator, number: int, split: Split) -> Examples:
        """See `Task.sample`."""
        bits = uniform(rng, self.lengths, number)[:, None] - 1
        position = np.arange(self.length)
        inputs = np.where(position < bits, rng.integers(1, 3, (number, self.length), dtype=np.int32), np.int32(_PAD))
        parity = np.cumsum(inputs == 2, axis=1, dtype=np.int32) % 2 + 1
        asked = position < bits if self.every_token else position == bits - 1
        return Examples(inputs, np.where(asked, parity, IGNORED).astype(np.int32), identity=identity_of_padded(inputs))


@dataclass(frozen=True, kw_only=True)
class _Arithmetic(_Words):
    """Expressions over the digits modulo a number; `=` asks for the value."""

    modulus: int = 5

    def __post_init__(self) -> None:
        check_fields(self)
        at_least(self, modulus=2)
        check_range("lengths", self.lengths, 3)

    @property
    def chance(self) -> float:
        """Of a digit drawn uniformly; a guess by frequency does better on short words, where products are often 0."""
        return 1 / self.modulus

    def _asked(self, inputs: np.ndarray, values: np.ndarray) -> Examples:
        targets = np.where(inputs == _EQUALS, values[:, None] % self.modulus + _ZERO, IGNORED)
        return Examples(inputs, targets.astype(np.int32), identity=identity_of_padded(inputs))


@dataclass(frozen=True, kw_only=True)
class ModularArithmetic(_Arithmetic):
    """The value of a chain of digits joined by +, - and *, with the usual precedence, modulo 5.

    Layout: `d op d op ... d =`, then padding; the value is asked at `=`. Tokens: padding 0, + 1, - 2, * 3, = 4, and digit d
    is 5 + d. Digits and operators are uniform and independent.

    Attributes:
        lengths: smallest and largest length in tokens with the answer; all odd lengths between are equally likely
            (an expression of n digits has length 2 n + 1). The paper tests on (40, 256).
        modulus: how many digits there are.

    Source: Grazzi et al., Unlocking State-Tracking in Linear RNNs Through Negative Eigenvalues, section 5.1 and
    appendix E.1.

    Examples:
        >>> examples = draw(ModularArithmetic(lengths=(3, 11)), 3, split="train", seed=0)
        >>> (examples.targets != IGNORED).sum(axis=1).tolist()  # one question each
        [1, 1, 1]
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self._digits[0] > self._digits[1]:
            raise ValueError(f"lengths must contain an odd number, got {self.lengths}")

    @property
    def _digits(self) -> Range:
        return self.lengths[0] // 2, (self.lengths[1] - 1) // 2

    @property
    def vocab_size(self) -> int:
        """Padding, four signs and the digits."""
        return _ZERO + self.modulus

    def sample(self, rng: np.random.Generator, number: int, split: Split) -> Examples:
        """See `Task.sample`."""
        most = self._digits[1]
        count = uniform(rng, self._digits, number)[:, None]
        digits = rng.integers(0, self.modulus, (number, most))
        signs = rng.integers(_PLUS, _TIMES + 1, (number, most))
        inputs = np.zeros((number, self.length), np.int32)
        place = np.arange(most)
        inputs[:, 0 : 2 * most : 2] = np.where(place < count, digits + _ZERO, _PAD)
        ends = np.where(place == count - 1, _EQUALS, signs)
        inputs[:, 1 : 2 * most : 2] = np.where(place < count, ends, _PAD)
        total, term = np.zeros(number, np.int64), digits[:, 0]
        for index in range(1, most):  # sum of the finished terms, and the term that may still be multiplied
            digit, sign, live = digits[:, index], signs[:, index - 1], index < count[:, 0]
            times = sign == _TIMES
            total = np.where(live & ~times, total + term, total)
            other = np.where(sign == _MINUS, -digit, digit)
            term = np.where(live, np.where(times, term * digit % self.modulus, other), term)
        return self._asked(inputs, total + term)


@dataclass(frozen=True, kw_only=True)
class BracketedArithmetic(_Arithmetic):
    """The value of an expression with nested brackets, modulo 5.

    Layout: `expression =`, then padding; the value is asked at `=`. An expression of fewer than five tokens is `d`, `-d`,
    `(d)` or `(-d)`, by its length; a longer one of m tokens is `(left op right)`, the length of the left part uniform on
    1 to m - 4. Tokens: padding 0, + 1, - 2 (also the unary one), * 3, = 4, digit d is 5 + d, then ( and ).

    Attributes:
        lengths: smallest and largest length in tokens with `=` and the answer, all equally likely. The paper tests on
            (40, 256).
        modulus: how many digits there are.
        multiplication: use * beside + and -; the benchmark does not, its token exists all the same.

    Source: Grazzi et al., Unlocking State-Tracking in Linear RNNs Through Negative Eigenvalues, section 5.1 and
    appendix E.1.

    Examples:
        >>> draw(BracketedArithmetic(lengths=(3, 12)), 3, split="train", seed=0).inputs.shape
        (3, 11)
    """

    multiplication: bool = False

    @property
    def vocab_size(self) -> int:
        """Padding, four signs, the digits and two brackets."""
        return _ZERO + self.modulus + 2

    def sample(self, rng: np.random.Generator, number: int, split: Split) -> Examples:
        """See `Task.sample`."""
        inputs = np.zeros((number, self.length), np.int32)
        size = uniform(rng, self.lengths, number) - 2
        inputs[np.arange(number), size] = _EQUALS
        values = self._write(rng, inputs.reshape(-1), np.arange(number) * self.length, size)
        return self._asked(inputs, values)

    def _write(self, rng: np.random.Generator, tokens: np.ndarray, start: np.ndarray, size: np.ndarray) -> np.ndarray:
        """Fills tokens[start : start + size] with one expression each, all at once; returns their values."""
        opening = _ZERO + self.modulus
        tokens[start[size > 2]], tokens[(start + size - 1)[size > 2]] = opening, opening + 1
        leaf = size < 5
        values = rng.integers(0, self.modulus, len(size))
        tokens[(start + size // 2)[leaf]] = values[leaf] + _ZERO
        negative = leaf & (size % 2 == 0)
        tokens[(start + size // 2 - 1)[negative]] = _MINUS
        values = np.where(negative, -values, values)
        if not leaf.all():
            begin, inner = start[~leaf] + 1, size[~leaf] - 3
            left = rng.integers(1, inner)
            sign = rng.integers(_PLUS, (_TIMES if self.multiplication else _MINUS) + 1, len(begin))
            tokens[begin + left] = sign
            parts = np.concatenate([begin, begin + left + 1]), np.concatenate([left, inner - left])
            a, b = self._write(rng, tokens, *parts).reshape(2, -1)
            values[~leaf] = np.select([sign == _PLUS, sign == _MINUS], [a + b, a - b], a * b)
        return values % self.modulus
