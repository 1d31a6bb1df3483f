"""What a prediction costs: nats for each token, bits for each byte of text."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from delta_jax.ops.partition import Axes, by_parts

__all__ = ["bits_per_byte", "counted_targets", "token_nats"]


def counted_targets(
    targets: Int[Any, "*leading time"], mask: Num[Any, "*leading time"] | Bool[Any, "*leading time"] | None = None
) -> Bool[Any, "*leading time"]:
    """Which targets count in a loss: those that are no negative number, such as -100, and where the mask is above zero.

    Args:
        targets: [..., T] token ids, of numpy or jax.
        mask: [..., T], bool or numbers; None is all.
    """
    if mask is None:
        return targets >= 0
    return (targets >= 0) & (mask if mask.dtype == bool else mask > 0)


def token_nats(
    logits: Float[Array, "batch time vocabulary"],
    targets: Int[Array, "batch time"],
    counted: Bool[Array, "batch time"] | None = None,
) -> Float[Array, "batch time"]:
    """Cross-entropy of each token, `-log softmax(logits)[target]`, in float32.

    Args:
        logits: [B, T, vocabulary], any floating dtype.
        targets: [B, T] token ids. A negative one, such as -100, does not count.
        counted: [B, T] bool, false where a target does not count either; None is all.

    Returns:
        [B, T] nats. What does not count is selected away: it costs nothing and has no gradient, whatever its logits hold.
    """
    by_token: Axes = ("batch", None)
    (nats,) = by_parts(_token_nats, (logits, targets, counted), ((*by_token, None), by_token, by_token), (by_token,))
    return nats


def _token_nats(logits: Array, targets: Array, counted: Array | None) -> tuple[Array]:
    counted = counted_targets(targets, counted)
    logits = jnp.where(counted[..., None], logits.astype(jnp.float32), 0.0)
    picked = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    return (jnp.where(counted, jax.nn.logsumexp(logits, axis=-1) - picked, 0.0),)


def bits_per_byte(nats: float, number_of_bytes: int | float) -> float:
    """The code length `nats / ln 2` per byte of text."""
    return nats / math.log(2) / max(number_of_bytes, 1)
