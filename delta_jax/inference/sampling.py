"""Choosing the next token from logits: repetition penalty, greedy or temperature, top-k, top-p, min-p; pure functions."""

import math
import numbers
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from delta_jax.layers.checks import require_positive_integers, require_positive_integers_or_none

__all__ = ["Sampling", "SamplingNumbers", "draw", "keep_min_p", "keep_top_k", "keep_top_p", "penalize", "sample"]


class SamplingNumbers(NamedTuple):
    """What `draw` is told, as arrays: no value of them makes it compile again.

    Attributes:
        temperature: float32; 0 takes the likeliest token.
        top_k: int32; the size of the vocabulary, or more, keeps all tokens.
        top_p: float32; 1 keeps all tokens.
        min_p: float32; 0 keeps all tokens.
        repetition_penalty: float32; 1 changes nothing.
    """

    temperature: Float[Array, ""]
    top_k: Int[Array, ""]
    top_p: Float[Array, ""]
    min_p: Float[Array, ""]
    repetition_penalty: Float[Array, ""]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is drawn: the repetition penalty first, then the temperature, top-k, top-p and min-p.

    Attributes:
        temperature: logits are divided by it; 0 takes the likeliest token, and so does any that vanishes beside the
            differences of the logits, but for equal ones, among which it draws.
        top_k: only the k likeliest tokens may be drawn; None is all.
        top_p: only the fewest tokens whose probabilities sum to at least p may be drawn; None is all.
        min_p: only tokens at least this share as probable as the likeliest may be drawn; None or 0 is all.
        repetition_penalty: see `penalize`; None or 1 changes nothing. It goes with greedy decoding too.

    Raises:
        ValueError: one is out of its range, or there is a choice among tokens at temperature 0.

    Examples:
        >>> Sampling(temperature=0.8, top_p=0.95)
        Sampling(temperature=0.8, top_k=None, top_p=0.95, min_p=None, repetition_penalty=None)
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    def __post_init__(self) -> None:
        if not _is_number(self.temperature) or not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be 0 (greedy) or a positive number, got {self.temperature!r}")
        require_positive_integers_or_none(top_k=self.top_k)
        if self.top_p is not None:
            _require_share(top_p=self.top_p)
        if self.min_p is not None:
            _require_share_or_zero(min_p=self.min_p)
        if self.repetition_penalty is not None:
            _require_penalty(repetition_penalty=self.repetition_penalty)
        if self.temperature == 0 and (self.top_k, self.top_p, self.min_p) != (None, None, None):
            raise ValueError("top_k, top_p and min_p need a temperature above 0: greedy decoding does not draw")

    def numbers(self) -> SamplingNumbers:
        """The same, for `draw`; a number that is no normal float32, or whose reciprocal is none, becomes the next."""
        all_tokens = np.iinfo(np.int32).max
        return SamplingNumbers(
            jnp.float32(_normal(self.temperature) if self.temperature else 0.0),
            jnp.int32(all_tokens if self.top_k is None else min(self.top_k, all_tokens)),
            jnp.float32(1.0 if self.top_p is None else _normal(self.top_p)),
            jnp.float32(_normal(self.min_p) if self.min_p else 0.0),
            jnp.float32(1.0 if self.repetition_penalty is None else _normal(self.repetition_penalty)),
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


def keep_min_p(logits: Float[Array, "*leading vocab"], p: float | Float[Array, ""]) -> Float[Array, "*leading vocab"]:
    """Sets to -inf the tokens less than p times as probable as the likeliest; 0 keeps every token.

    Raises:
        ValueError: p is a number outside [0, 1].

    Source: Nguyen et al., "Turning up the heat: min-p sampling for creative and coherent LLM outputs", 2024, section 3.

    Examples:
        >>> keep_min_p(jnp.log(jnp.array([0.5, 0.3, 0.2])), 0.5)[2].item()  # 0.2 is less than half of 0.5
        -inf
    """
    if not isinstance(p, jax.Array):
        _require_share_or_zero(p=p)
    scores = logits.astype(jnp.float32)
    least = jnp.log(jnp.asarray(p, jnp.float32))
    return jnp.where(scores - jnp.max(scores, axis=-1, keepdims=True) >= least, logits, -jnp.inf)


def penalize(
    logits: Float[Array, "*leading vocab"], seen: Bool[Array, "*leading vocab"], penalty: float | Float[Array, ""]
) -> Float[Array, "*leading vocab"]:
    """Divides the positive logits of tokens seen before by the penalty, and multiplies the negative ones by it.

    Args:
        logits: [..., V].
        seen: [..., V], which tokens the prompt and the text so far hold.
        penalty: above 1 tokens repeat less, below 1 more; 1 changes nothing.

    Returns:
        logits [..., V]; none is infinite that was finite but negative ones that overflow.

    Raises:
        ValueError: the penalty is no positive number.

    Source: Keskar et al., "CTRL: a conditional transformer language model for controllable generation", 2019, section 4.1,
    in the form that transformers gave it: the paper divides negative logits too, which would favour their tokens.

    Examples:
        >>> penalize(jnp.array([2.0, -2.0, 2.0]), jnp.array([True, True, False]), 2.0).tolist()
        [1.0, -4.0, 2.0]
    """
    if not isinstance(penalty, jax.Array):
        _require_penalty(penalty=penalty)
        penalty = _normal(penalty)
    factor = jnp.asarray(penalty, logits.dtype)
    finite = jnp.minimum(logits / factor, jnp.finfo(logits.dtype).max)
    return jnp.where(seen, jnp.where(logits > 0, finite, logits * factor), logits)


def draw(
    logits: Float[Array, "batch vocab"],
    told: SamplingNumbers,
    keys: Key[Array, " batch"],
    seen: Bool[Array, "batch vocab"] | None = None,
) -> Int[Array, " batch"]:
    """Draws one token a row; `Sampling` says what of. Nothing is static, and only what is asked for is computed.

    Args:
        logits: [B, V].
        told: from `Sampling.numbers`.
        keys: [B] PRNG keys, one a row; not used at temperature 0.
        seen: [B, V], the tokens that the repetition penalty is for; None is none.

    Returns:
        token ids [B], int32.
    """
    vocabulary = logits.shape[-1]
    if seen is not None:
        penalty = told.repetition_penalty
        logits = jax.lax.cond(penalty == 1, lambda: logits, lambda: penalize(logits, seen, penalty))

    def greedy() -> Int[Array, " batch"]:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def random() -> Int[Array, " batch"]:
        # Relative to the greatest, for a small temperature takes the logits themselves beyond float32.
        scores = logits.astype(jnp.float32)
        scores = (scores - jnp.max(scores, axis=-1, keepdims=True)) / told.temperature
        some: Bool[Array, ""] = (told.top_k < vocabulary) | (told.top_p < 1)
        kept = jax.lax.cond(some, lambda: keep_top_p(keep_top_k(scores, told.top_k), told.top_p), lambda: scores)
        kept = jax.lax.cond(told.min_p > 0, lambda: keep_min_p(kept, told.min_p), lambda: kept)
        return jax.vmap(jax.random.categorical)(keys, kept).astype(jnp.int32)

    tokens: Int[Array, " batch"] = jax.lax.cond(told.temperature > 0, random, greedy)
    return tokens


def sample(
    logits: Float[Array, "batch vocab"],
    sampling: Sampling,
    keys: Key[Array, " batch"] | None = None,
    seen: Bool[Array, "batch vocab"] | None = None,
) -> Int[Array, " batch"]:
    """Draws one token a row.

    Args:
        logits: [B, V].
        sampling: how to draw.
        keys: [B] PRNG keys, one a row, so that a row's draw does not depend on its neighbours; None when
            greedy.
        seen: [B, V], which tokens the text of each row holds; needed for a repetition penalty.

    Returns:
        token ids [B], int32.

    Raises:
        ValueError: keys are missing though the temperature is above 0, or seen though there is a repetition penalty.

    Examples:
        >>> logits = jnp.array([[0.0, 5.0, 0.0], [1.0, 0.0, 0.0]])
        >>> sample(logits, Sampling()).tolist()
        [1, 0]
        >>> keys = jax.random.split(jax.random.key(0), 2)  # one for each row
        >>> sample(logits, Sampling(temperature=1.0, top_k=1), keys).tolist()
        [1, 0]
    """
    if seen is None and sampling.repetition_penalty not in (None, 1):
        raise ValueError("seen must be given for a repetition_penalty, it says which tokens the text holds")
    if keys is None:
        if sampling.temperature > 0:
            raise ValueError("keys must be given when the temperature is above 0")
        keys = jax.random.split(jax.random.key(0), logits.shape[0])
    return draw(logits, sampling.numbers(), keys, seen)


def _ranks(logits: Float[Array, "*leading vocab"]) -> Int[Array, "*leading vocab"]:
    """The place of every logit in descending order; the lower id comes first among equals."""
    return jnp.argsort(jnp.argsort(-logits, axis=-1, stable=True), axis=-1)


def _require_share(**shares: Any) -> None:
    for name, share in shares.items():
        if not _is_number(share) or not 0 < share <= 1:
            raise ValueError(f"{name} must lie in (0, 1], got {share!r}")


def _require_share_or_zero(**shares: Any) -> None:
    for name, share in shares.items():
        if not _is_number(share) or not 0 <= share <= 1:
            raise ValueError(f"{name} must lie in [0, 1], got {share!r}")


def _require_penalty(**penalties: Any) -> None:
    for name, penalty in penalties.items():
        if not _is_number(penalty) or not 0 < penalty < math.inf:
            raise ValueError(f"{name} must be a positive number, of which 1 changes nothing, got {penalty!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _normal(number: float) -> float:
    """The nearest number that is a normal float32 and has a normal reciprocal."""
    return float(min(max(number, 1e-37), 1e37))
