"""MAD's tasks of memory: memorization, compression, selective copying; its three recall tasks are in mad_recall.py."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from delta_jax.config import check_fields
from delta_jax.data.tasks.draws import at_least
from delta_jax.data.tasks.examples import IGNORED, Examples, Split

__all__ = ["Compression", "Memorization", "SelectiveCopying"]


@dataclass(frozen=True, kw_only=True)
class Memorization:
    """The value of each key, in a dictionary that is the same in all sequences and shown in none.

    A sequence is `key INSERT key INSERT ...`, keys drawn with replacement; the target at each INSERT is the value of the
    key before it. There are `keys` = (vocab_size - 1) // 2 keys, tokens 0 to keys - 1, as many values, the tokens that
    follow, and INSERT is the last token. What is to be learnt is in the weights: train and test share the dictionary.

    Attributes:
        vocab_size: tokens, INSERT among them.
        length: tokens of a sequence; even.
        map_seed: of the dictionary.

    Source: Poli et al., "Mechanistic Design and Scaling of Hybrid Architectures" (2024), section 3.1 and appendix B. The
    benchmark trains on 256 sequences. Its dictionary has the same distribution, not the same entries.

    Examples:
        >>> examples = draw(Memorization(length=8), 3, split="train", seed=0)
        >>> examples.inputs[0, 1::2].tolist()  # INSERT
        [255, 255, 255, 255]
    """

    vocab_size: int = 256
    length: int = 32
    map_seed: int = 12345

    def __post_init__(self) -> None:
        check_fields(self)
        at_least(self, vocab_size=5, length=2, map_seed=0)
        if self.length % 2:
            raise ValueError(f"length must be even, got {self.length}")

    @property
    def keys(self) -> int:
        """How many keys there are, and how many values."""
        return (self.vocab_size - 1) // 2

    @property
    def values(self) -> np.ndarray:
        """[keys] int32: the dictionary."""
        return (self.keys + np.random.default_rng(self.map_seed).permutation(self.keys)).astype(np.int32)

    @property
    def chance(self) -> float:
        return 1 / self.keys

    def sample(self, rng: np.random.Generator, number: int, split: Split) -> Examples:
        inputs = np.full((number, self.length), self.vocab_size - 1, np.int32)
        inputs[:, ::2] = rng.integers(0, self.keys, (number, self.length // 2))
        targets = np.full(inputs.shape, IGNORED, np.int32)
        targets[:, 1::2] = self.values[inputs[:, ::2]]
        return Examples(inputs, targets)


@dataclass(frozen=True, kw_only=True)
class Compression:
    """The whole sequence, told from the output at its last position alone.

    A sequence is length - 1 random tokens and then COMPRESS, the last token of the vocabulary. `targets` are the inputs:
    targets[:, t] is asked of a decoder that reads the model's output at the last position and the number t, not of the
    output at t. The target of COMPRESS itself counts, as in the benchmark.

    Attributes:
        vocab_size: tokens, COMPRESS among them.
        length: tokens of a sequence, COMPRESS among them.

    Source: Poli et al. (2024), section 3.1 and appendix B: the decoder is a two-layer perceptron on the last output plus
    a sinusoidal embedding of t.

    Examples:
        >>> examples = draw(Compression(vocab_size=16, length=8), 3, split="train", seed=0)
        >>> examples.inputs[:, -1].tolist(), bool((examples.targets == examples.inputs).all())
        ([15, 15, 15], True)
    """

    vocab_size: int = 16
    length: int = 32

    def __post_init__(self) -> None:
        check_fields(self)
        at_least(self, vocab_size=3, length=2)

    @property
    def chance(self) -> float:
        return ((self.length - 1) / (self.vocab_size - 1) + 1) / self.length

    def sample(self, rng: np.random.Generator, number: int, split: Split) -> Examples:
        inputs = rng.integers(0, self.vocab_size - 1, (number, self.length), np.int32)
        inputs[:, -1] = self.vocab_size - 1
        return Examples(inputs, inputs.copy())


@dataclass(frozen=True, kw_only=True)
class SelectiveCopying:
    """The tokens that stood between blanks, in their order.

    A sequence is `copies` random tokens with blanks strewn before each, the token COPY, then `copies` blanks; the targets
    at those are the tokens in order. Each blank of the first part falls before one of the tokens at random, so that the
    last of them stands right before COPY, as in the benchmark. BLANK is vocab_size - 2 and COPY vocab_size - 1.

    Attributes:
        vocab_size: tokens, BLANK and COPY among them.
        length: tokens of a sequence.
        copies: tokens to be copied.

    Source: Poli et al. (2024), section 3.1 and appendix B. (The benchmark's code strews blanks with numpy's global
    generator, so its seed does not fix its data; here everything comes from `rng`.)

    Examples:
        >>> examples = draw(SelectiveCopying(length=24, copies=4), 2, split="train", seed=0)
        >>> first = examples.inputs[0]
        >>> examples.targets[0, -4:].tolist() == first[first < 14].tolist()  # without blanks and COPY
        True
    """

    vocab_size: int = 16
    length: int = 256
    copies: int = 16

    def __post_init__(self) -> None:
        check_fields(self)
        at_least(self, vocab_size=4, copies=1)
        if self.length < 2 * self.copies + 1:
            raise ValueError(f"length must be at least 2 * copies + 1 = {2 * self.copies + 1}, got {self.length}")

    @property
    def chance(self) -> float:
        return 1 / (self.vocab_size - 2)

    def sample(self, rng: np.random.Generator, number: int, split: Split) -> Examples:
        tokens = rng.integers(0, self.vocab_size - 2, (number, self.copies), np.int32)
        blanks = self.length - 2 * self.copies - 1
        before = rng.multinomial(blanks, np.full(self.copies, 1 / self.copies), size=number)
        inputs = np.full((number, self.length), self.vocab_size - 2, np.int32)
        np.put_along_axis(inputs, np.cumsum(before, axis=1) + np.arange(self.copies), tokens, axis=1)
        inputs[:, -self.copies - 1] = self.vocab_size - 1
        targets = np.full(inputs.shape, IGNORED, np.int32)
        targets[:, -self.copies :] = tokens
        return Examples(inputs, targets)
