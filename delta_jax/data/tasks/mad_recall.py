"""MAD's three tasks of recall in context: plain, with noise, and with keys and values of several tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from delta_jax.config import check_fields
from delta_jax.data.tasks.draws import at_least, distinct, first_uses, one_of
from delta_jax.data.tasks.examples import IGNORED, Examples, Split

__all__ = ["FuzzyRecall", "InContextRecall", "NoisyRecall"]


def _next_tokens(tokens: np.ndarray, asked: np.ndarray, split: Split) -> Examples:
    """Training asks for every next token, the test for those that `asked` [n, T] marks."""
    targets = np.full(tokens.shape, IGNORED, np.int32)
    targets[:, :-1] = tokens[:, 1:] if split == "train" else np.where(asked, tokens, IGNORED)[:, 1:]
    return Examples(tokens, targets)


@dataclass(frozen=True, kw_only=True)
class InContextRecall:
    """The value of a key, in a dictionary that every sequence makes anew.

    A sequence is length / 2 slots `key value`. Keys are drawn uniformly with replacement; a key's value is drawn at its
    first use and stays. The last key is one that was shown before. A slot is with probability `noise` two noise tokens
    instead (never the last, and not all). Keys are the tokens 0 to K - 1, values K to V - 1 and noise V to
    vocab_size - 1, where V = vocab_size - noise_tokens and K = V // 2.

    **The splits ask different things**, as in the benchmark: training has the next token as target everywhere, most of
    it unpredictable; the test has the value as target at every key that was shown before, and nothing else. The last
    position has no target.

    Attributes:
        vocab_size: tokens, noise among them.
        length: tokens of a sequence; even.
        noise_tokens: how many tokens are noise.
        noise: probability of a slot to be noise.

    Source: Poli et al., "Mechanistic Design and Scaling of Hybrid Architectures" (2024), section 3.1 and appendix B.

    Examples:
        >>> examples = draw(InContextRecall(vocab_size=8, length=16), 3, split="test", seed=0)
        >>> examples.targets[examples.targets != IGNORED].min().item() >= 4  # values
        True
    """

    vocab_size: int = 16
    length: int = 128
    noise_tokens: int = 0
    noise: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self)
        at_least(self, length=4, noise_tokens=0)
        if self.vocab_size - self.noise_tokens < 2:
            raise ValueError(f"vocab_size must exceed noise_tokens by 2 or more, got {self.vocab_size}")
        if self.length % 2:
            raise ValueError(f"length must be even, got {self.length}")
        if not 0 <= self.noise < 1:
            raise ValueError(f"noise must be in [0, 1), got {self.noise}")
        if self.noise and not self.noise_tokens:
            raise ValueError("noise_tokens must be positive where noise is")

    @property
    def _first_value(self) -> int:
        return (self.vocab_size - self.noise_tokens) // 2

    @property
    def _first_noise(self) -> int:
        return self.vocab_size - self.noise_tokens

    @property
    def chance(self) -> float:
        return 1 / (self._first_noise - self._first_value)

    def sample(self, rng: np.random.Generator, number: int, split: Split) -> Examples:
        keys, slots = self._first_value, self.length // 2
        dictionary = rng.integers(keys, self._first_noise, (number, keys))
        key = rng.integers(0, keys, (number, slots))
        noisy = rng.random((number, slots)) < self.noise
        noisy[np.arange(number), rng.integers(0, slots - 1, number)] = False
        noisy[:, -1] = False
        shown = np.zeros((number, keys), bool)
        rows, columns = np.nonzero(~noisy[:, :-1])
        shown[rows, key[rows, columns]] = True
        key[:, -1] = one_of(rng, shown)

        pairs = np.stack([key, np.take_along_axis(dictionary, key, axis=1)], axis=2)
        if self.noise:
            pairs[noisy] = rng.integers(self._first_noise, self.vocab_size, (int(noisy.sum()), 2))
        names = np.where(noisy, keys + np.arange(slots), key)
        asked = np.zeros((number, slots, 2), bool)
        asked[..., 1] = first_uses(names) < np.arange(slots)
        return _next_tokens(pairs.reshape(number, -1).astype(np.int32), asked.reshape(number, -1), split)


@dataclass(frozen=True, kw_only=True)
class NoisyRecall(InContextRecall):
    """`InContextRecall` at the benchmark's setting with noise.

    Examples:
        >>> draw(NoisyRecall(length=32), 3, split="train", seed=0).inputs.shape
        (3, 32)
    """

    vocab_size: int = 32
    noise_tokens: int = 16
    noise: float = 0.2


@dataclass(frozen=True, kw_only=True)
class FuzzyRecall:
    """Recall where keys and values are motifs, one to three tokens that differ among themselves.

    A sequence is PAD (the last token, vocab_size - 1) as often as needed, then `key value key value ...`. The size of a
    motif is uniform from 1 to its maximum, and a motif of a size uniform among the ordered choices of so many tokens;
    **in the test split keys always have the maximal size**. A key's value is drawn at its first use and stays. The last
    key is that of an earlier slot, each equally likely. Key motifs are of tokens 0 to K - 1, value motifs of K to
    vocab_size - 2, K = (vocab_size - 1) // 2.

    Training has the next token as target everywhere; the test has all tokens of the value of every key that was shown
    before, each at the position before it, and nothing else.

    Attributes:
        vocab_size: tokens, PAD among them.
        length: tokens of a sequence.
        key_size: most tokens of a key.
        value_size: most tokens of a value.

    Source: Poli et al. (2024), section 3.1 and appendix B. (In the benchmark's code the last key can be one that was
    never shown, when its place falls behind the end of the context; here it always was.)

    Examples:
        >>> draw(FuzzyRecall(length=32), 3, split="test", seed=0).inputs.shape
        (3, 32)
    """

    vocab_size: int = 16
    length: int = 128
    key_size: int = 3
    value_size: int = 3

    def __post_init__(self) -> None:
        check_fields(self)
        at_least(self, key_size=1, value_size=1)
        if self._first_value < self.key_size or self.vocab_size - 1 - self._first_value < self.value_size:
            raise ValueError(f"vocab_size must leave as many tokens as a motif has, got {self.vocab_size}")
        if self.length < 2 * (self.key_size + self.value_size):
            needed = 2 * (self.key_size + self.value_size)
            raise ValueError(f"length must be at least 2 * (key_size + value_size) = {needed}, got {self.length}")

    @property
    def _first_value(self) -> int:
        return (self.vocab_size - 1) // 2

    @property
    def chance(self) -> float:
        return 1 / (self.vocab_size - 1 - self._first_value)

    def sample(self, rng: np.random.Generator, number: int, split: Split) -> Examples:
        smallest = 1 if split == "train" else self.key_size
        slots = self.length // (smallest + 1)
        keys, key_sizes = _motifs(rng, (number, slots), self._first_value, smallest, self.key_size)
        values, value_sizes = _motifs(rng, (number, slots), self.vocab_size - 1 - self._first_value, 1, self.value_size)
        first = first_uses((keys + 1) @ self.vocab_size ** np.arange(self.key_size))
        used = key_sizes + np.take_along_axis(value_sizes, first, axis=1)
        # Slots fill what the longest last pair leaves; that pair repeats one of them.
        context = (np.cumsum(used, axis=1) <= self.length - self.key_size - self.value_size).sum(axis=1)
        probe = rng.integers(0, context)
        source = np.where(np.arange(slots + 1) < context[:, None], np.append(first, first[:, :1], axis=1), -1)
        source[np.arange(number), context] = first[np.arange(number), probe]

        sizes = np.where(source >= 0, np.take_along_axis(used, source, axis=1), 0)
        start = np.cumsum(sizes, axis=1) - sizes + self.length - sizes.sum(axis=1, keepdims=True)
        tokens = np.full((number, self.length), self.vocab_size - 1, np.int32)
        asked = np.zeros(tokens.shape, bool)
        rows, columns = np.nonzero(source >= 0)
        at, origin = start[rows, columns], source[rows, columns]
        key_size, value_size = key_sizes[rows, origin], value_sizes[rows, origin]
        for place in range(self.key_size):
            here = place < key_size
            tokens[rows[here], (at + place)[here]] = keys[rows[here], origin[here], place]
        for place in range(self.value_size):
            here = place < value_size
            there = (at + key_size + place)[here]
            tokens[rows[here], there] = self._first_value + values[rows[here], origin[here], place]
            asked[rows[here], there] = (origin < columns)[here]
        return _next_tokens(tokens, asked, split)


def _motifs(
    rng: np.random.Generator, shape: tuple[int, int], tokens: int, smallest: int, largest: int
) -> tuple[np.ndarray, np.ndarray]:
    """Motifs [n, m, largest], -1 behind the end of shorter ones, and their sizes [n, m]."""
    sizes = rng.integers(smallest, largest + 1, shape)
    motifs = distinct(rng, shape[0] * shape[1], tokens, largest).reshape(*shape, largest)
    return np.where(np.arange(largest) < sizes[..., None], motifs, -1), sizes
