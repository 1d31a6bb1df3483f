"""Choosing the next token from logits: greedy, temperature, top-k and top-p, as pure functions."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

__all__ = ["Sampling", "keep_top_k", "keep_top_p", "sample"]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is drawn: the temperature first, then top-k, then top-p.

    Attributes:
        temperature: logits are divided by it; 0 takes the likeliest token.
        top_k: only the k likeliest tokens may be drawn; None is all.
        top_p: only the fewest tokens whose probabilities sum to at least p may be drawn; None is all.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 (greedy) or a positive number, got {self.temperature}")
        if self.top_k is not None and (not isinstance(self.top_k, int) or self.top_k < 1):
            raise ValueError(f"top_k must be a positive integer or None, got {self.top_k!r}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1] or be None, got {self.top_p}")
        if self.temperature == 0 and (self.top_k is not None or self.top_p is not None):
            raise ValueError("top_k and top_p need a temperature above 0: greedy decoding does not draw")


def keep_top_k(logits: Float[Array, "*leading vocab"], k: int) -> Float[Array, "*leading vocab"]:
    """Sets all but the k greatest logits to -inf; of equal ones the lower ids are kept first."""
    return jnp.where(_ranks(logits) < k, logits, -jnp.inf)


def keep_top_p(logits: Float[Array, "*leading vocab"], p: float) -> Float[Array, "*leading vocab"]:
    """Sets to -inf all but the fewest likeliest tokens whose probabilities sum to at least p.

    Source: Holtzman et al., "The curious case of neural text degeneration", 2019, section 3.1.
    """
    ordered = -jnp.sort(-jax.nn.softmax(logits.astype(jnp.float32)), axis=-1)
    before = jnp.cumsum(ordered, axis=-1) - ordered
    kept = jnp.maximum(jnp.sum(before < p, axis=-1, keepdims=True), 1)
    return jnp.where(_ranks(logits) < kept, logits, -jnp.inf)


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
    """
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if keys is None:
        raise ValueError("keys must be given when the temperature is above 0")
    logits = logits.astype(jnp.float32) / sampling.temperature
    if sampling.top_k is not None:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p is not None:
        logits = keep_top_p(logits, sampling.top_p)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def _ranks(logits: Float[Array, "*leading vocab"]) -> Int[Array, "*leading vocab"]:
    """The place of every logit in descending order; the lower id comes first among equals."""
    return jnp.argsort(jnp.argsort(-logits, axis=-1, stable=True), axis=-1)
