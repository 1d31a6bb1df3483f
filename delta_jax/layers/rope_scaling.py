"""How a rotary embedding is stretched for sequences longer than those it was trained on."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from delta_jax.config import check_fields
from delta_jax.layers.checks import require_positive_integers_or_none, require_positive_numbers

__all__ = ["RopeScaling"]

# Which fields a kind reads besides its factor.
_FIELDS = {
    "linear": (),
    "llama3": ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "yarn": ("original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor"),
}


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Wave lengths of a rotary embedding, stretched: fully where they are long, and not at all where they are short.

    A pair of channels that turns r times within `original_max_position_embeddings` tokens has its angle multiplied by

        linear    1 / factor
        llama3    1 / factor for r < low_freq_factor, 1 for r > high_freq_factor, and in a straight line in r between
        yarn      1 for pairs below that of beta_fast turns, 1 / factor for pairs beyond that of beta_slow turns, both
                  rounded outwards, and in a straight line in the number of the pair between

    Attributes:
        kind: "linear", "llama3" or "yarn".
        factor: by how much the longest wave lengths are stretched, at least 1.
        original_max_position_embeddings: tokens of the sequences it was trained on, for "llama3" and "yarn".
        low_freq_factor, high_freq_factor: turns within them, for "llama3".
        beta_fast, beta_slow: turns within them, for "yarn".
        attention_factor: for "yarn", multiplies queries and keys where they are rotated; None is 0.1 ln(factor) + 1.

    Raises:
        ValueError: a value is impossible or missing, or not for this kind.

    Source: linear: Chen et al., "Extending context window of large language models via positional interpolation", 2023;
    llama3: Grattafiori et al., "The Llama 3 herd of models", 2024, in its released code; yarn: Peng et al., "YaRN", 2023
    (arXiv 2309.00071) sections 3.2 to 3.4, with the rounding of its released code. Names and defaults are those of Hugging
    Face transformers.

    Examples:
        >>> scaling = RopeScaling(kind="yarn", factor=4.0, original_max_position_embeddings=32768)
        >>> scaling.factors(theta=1e6, channels=128)[[0, -1]].tolist()
        [1.0, 0.25]
        >>> round(scaling.amplitude, 4)
        1.1386
    """

    kind: Literal["linear", "llama3", "yarn"]
    factor: float
    original_max_position_embeddings: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        numbers = ("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow")
        require_positive_numbers(**{name: getattr(self, name) for name in numbers})
        require_positive_integers_or_none(original_max_position_embeddings=self.original_max_position_embeddings)
        if self.attention_factor is not None:
            require_positive_numbers(attention_factor=self.attention_factor)
        for field in dataclasses.fields(self)[2:]:
            if field.name not in _FIELDS[self.kind] and getattr(self, field.name) != field.default:
                raise ValueError(f"{field.name} is not for kind {self.kind!r}, got {getattr(self, field.name)!r}")
        if self.kind != "linear" and self.original_max_position_embeddings is None:
            raise ValueError(f"original_max_position_embeddings is missing, which {self.kind} needs")
        if self.factor < 1:
            raise ValueError(f"factor must be at least 1, got {self.factor}")
        for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
            if not getattr(self, low) < getattr(self, high):
                raise ValueError(f"{low} must be below {high}, got {getattr(self, low)} and {getattr(self, high)}")

    @property
    def amplitude(self) -> float:
        """What queries and keys are multiplied by where they are rotated."""
        if self.kind != "yarn":
            return 1.0
        return 0.1 * math.log(self.factor) + 1.0 if self.attention_factor is None else self.attention_factor

    def factors(self, *, theta: float, channels: int) -> np.ndarray:
        """By what the angles of the `channels / 2` pairs are multiplied, [channels / 2] float32, computed in float64.

        Raises:
            ValueError: theta is not above 1.
        """
        if not theta > 1:
            raise ValueError(f"theta must be above 1 where wave lengths are stretched, got {theta}")
        pairs = np.arange(channels // 2)
        if self.kind == "linear":
            kept = np.zeros(len(pairs))
        else:
            tokens = self.original_max_position_embeddings
            assert tokens is not None
            if self.kind == "llama3":
                turns = tokens / (2 * math.pi) * float(theta) ** (-2 * pairs / channels)
                kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
            else:
                # The pair that turns so often within the tokens, whole or not.
                first, last = (
                    channels * math.log(tokens / (turns * 2 * math.pi)) / (2 * math.log(theta))
                    for turns in (self.beta_fast, self.beta_slow)
                )
                first, last = max(math.floor(first), 0), min(math.ceil(last), channels - 1)
                kept = 1 - (pairs - first) / (last - first if last != first else 0.001)
        kept = np.clip(kept, 0.0, 1.0)
        return ((1 - kept) / self.factor + kept).astype(np.float32)
