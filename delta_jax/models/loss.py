"""What a prediction costs: nats for each token, bits for each byte of text."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def token_nats(
    logits: Float[Array, "batch time vocabulary"], targets: Int[Array, "batch time"]
) -> Float[Array, "batch time"]:
    """Cross-entropy of each token, `-log softmax(logits)[target]`, in float32.

    Args:
        logits: [B, T, vocabulary], any floating dtype.
        targets: [B, T] token ids.

    Returns:
        [B, T] nats.
    """
    logits = logits.astype(jnp.float32)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked


def bits_per_byte(nats: float, number_of_bytes: int | float) -> float:
    """The code length `nats / ln 2` per byte of text."""
    return nats / math.log(2) / max(number_of_bytes, 1)
