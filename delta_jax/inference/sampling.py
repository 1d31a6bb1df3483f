"""Choosing the next token from logits: greedy, temperature, top-k and top-p, as pure functions."""

import math
import numbers
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from delta_jax.layers.checks import require_positive_integers, require_positive_integers_or_none

__all__ = ["Sampling", "SamplingNumbers", "draw", "keep_top_k", "keep_top_p", "sample"]


class SamplingNumbers(NamedTuple):
    """What `draw` is told, as arrays: no value of them makes it compile again.

    Attributes:
        temperature: float32; 0 takes the likeliest token.
        top_k: int32; the size of the vocabulary, or more, keeps all tokens.
        top_p: float32; 1 keeps all tokens.
    """

    temperature: Float[Array, ""]
    top_k: Int[Array, ""]
    top_p: Float[Array, ""]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is drawn: the temperature first, then top-k, then top-p.

    Attributes:
        temperature: logits are divided by it; 0 takes the likeliest token, and so does any that vanishes beside the
            differences of the logits, but for equal ones, among which it draws.
        top_k: only the k likeliest tokens may be drawn; None is all.
        top_p: only the fewest tokens whose probabilities sum to at least p may be drawn; None is all.

    Raises:
        ValueError: one is out of its range, or there is a choice among tokens at temperature 0.

    Examples:
        >>> Sampling(temperature=0.8, top_p=0.95)
        Sampling(temperature=0.8, top_k=None, top_p=0.95)
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not _is_number(self.temperature) or not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be 0 (greedy) or a positive number, got {self.temperature!r}")
        require_positive_integers_or_none(top_k=self.top_k)
        if self.top_p is not None:
            _require_share(top_p=self.top_p)
        if self.temperature == 0 and (self.top_k is not None or self.top_p is not None):
            raise ValueError("top_k and top_p need a temperature above 0: greedy decoding does not draw")

    def numbers(self) -> SamplingNumbers:
        """The same, for `draw`; a temperature that is no normal float32, or whose reciprocal is none, becomes the next."""
        smallest, greatest = 1e-37, 1e37
        all_tokens = np.iinfo(np.int32).max
        return SamplingNumbers(
            jnp.float32(min(max(self.temperature, smallest), greatest) if self.temperature else 0.0),
            jnp.int32(all_tokens if self.top_k is None else min(self.top_k, all_tokens)),
            jnp.float32(1.0 if self.top_p is None else max(self.top_p, smallest)),
        )


def keep_top_k(logits: Float[Array, "*leading vocab"], k: int | Int[Array, ""]) -> Float[Array, "*leading vocab"]:
    """Sets all but the k greatest logits to -inf; of equal ones the lower ids are kept first.

    Raises:
        ValueError: k is no positive integer.

    Examples:
        >>> keep_top_k(jnp.array([1.0, 3.0, 2.0]), 2).tolist()
        [-inf, 3.0, 2.0]
    """
    if not isinstance(k, jax.Array):
        require_positive_integers(k=k)
        k = min(k, logits.shape[-1])
    return jnp.where(_ranks(logits) < k, logits, -jnp.inf)


def keep_top_p(logits: Float[Array, "*leading vocab"], p: float | Float[Array, ""]) -> Float[Array, "*leading vocab"]:
    """Sets to -inf all but the fewest likeliest tokens whose probabilities sum to at least p; 1 keeps every token.

    Raises:
        ValueError: p is a number outside (0, 1].

    Source: Holtzman et al., "The curious case of neural text degeneration", 2019, section 3.1.

    Examples:
        >>> keep_top_p(jnp.log(jnp.array([0.5, 0.3, 0.2])), 0.7)[2].item()
        -inf
    """
    if not isinstance(p, jax.Array):
        _require_share(p=p)
    ordered = -jnp.sort(-jax.nn.softmax(logits.astype(jnp.float32)), axis=-1)
    before = jnp.cumsum(ordered, axis=-1) - ordered
    kept = jnp.maximum(jnp.sum(before < p, axis=-1, keepdims=True), 1)
    return jnp.where((_ranks(logits) < kept) | (p >= 1), logits, -jnp.inf)


def draw(
    logits: Float[Array, "batch vocab"], told: SamplingNumbers, keys: Key[Array, " batch"]
) -> Int[Array, " batch"]:
    """Draws one token a row; `sample` says what of. Nothing is static, and only what is asked for is computed.

    Args:
        logits: [B, V].
        told: from `Sampling.numbers`.
        keys: [B] PRNG keys, one a row; not used at temperature 0.

    Returns:
        token ids [B], int32.
    """
    vocabulary = logits.shape[-1]

    def greedy() -> Int[Array, " batch"]:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def random() -> Int[Array, " batch"]:
        # Relative to the greatest, for a small temperature takes the logits themselves beyond float32.
        scores = logits.astype(jnp.float32)
        scores = (scores - jnp.max(scores, axis=-1, keepdims=True)) / told.temperature
        some: Bool[Array, ""] = (told.top_k < vocabulary) | (told.top_p < 1)
        kept = jax.lax.cond(some, lambda: keep_top_p(keep_top_k(scores, told.top_k), told.top_p), lambda: scores)
        return jax.vmap(jax.random.categorical)(keys, kept).astype(jnp.int32)

    tokens: Int[Array, " batch"] = jax.lax.cond(told.temperature > 0, random, greedy)
    return tokens


def sample(
    logits: Float[Array, "batch vocab"], sampling: Sampling, keys: Key[Array, " batch"] | None = None
) -> Int[Array, " batch"]:
    """Draws one token a row.

    Args:
        logits: [B, V].
        sampling: how to draw.
        keys: [B] PRNG keys, one a row, so that a row's draw does not depend on its neighbours; None when
            greedy.

    Returns:
        token ids [B], int32.

    Raises:
        ValueError: keys are missing though the temperature is above 0.

    Examples:
        >>> logits = jnp.array([[0.0, 5.0, 0.0], [1.0, 0.0, 0.0]])
        >>> sample(logits, Sampling()).tolist()
        [1, 0]
        >>> keys = jax.random.split(jax.random.key(0), 2)  # one for each row
        >>> sample(logits, Sampling(temperature=1.0, top_k=1), keys).tolist()
        [1, 0]
    """
    if keys is None:
        if sampling.temperature > 0:
            raise ValueError("keys must be given when the temperature is above 0")
        keys = jax.random.split(jax.random.key(0), logits.shape[0])
    return draw(logits, sampling.numbers(), keys)


def _ranks(logits: Float[Array, "*leading vocab"]) -> Int[Array, "*leading vocab"]:
    """The place of every logit in descending order; the lower id comes first among equals."""
    return jnp.argsort(jnp.argsort(-logits, axis=-1, stable=True), axis=-1)


def _require_share(**shares: object) -> None:
    for name, share in shares.items():
        if not isinstance(share, numbers.Real) or isinstance(share, bool) or not 0 < float(share) <= 1:
            raise ValueError(f"{name} must lie in (0, 1], got {share!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
