"""Data-dependent log decays, how they come from a rate a head and a step a token, and how both begin."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

__all__ = ["bounded_log_decay", "initial_log_rate", "initial_step_bias", "log_decay"]


def log_decay(
    logits: Float[Array, "batch time *gate"], log_rate: Float[Array, " heads"], bias: Float[Array, " gates"]
) -> Float[Array, "batch time *gate"]:
    """`-exp(log_rate) * softplus(logits + bias)` in float32, for `*gate` of heads, or of heads and channels.

    Source: Dao and Gu, "Transformers are SSMs", 2024 (arXiv 2405.21060), the step and the rate of Mamba-2.
    """
    flat, rate = _flat(logits, log_rate, bias)
    return (-rate * jax.nn.softplus(flat)).reshape(logits.shape)


def bounded_log_decay(
    logits: Float[Array, "batch time *gate"],
    log_rate: Float[Array, " heads"],
    bias: Float[Array, " gates"],
    lower_bound: float,
) -> Float[Array, "batch time *gate"]:
    """`lower_bound * sigmoid(exp(log_rate) * (logits + bias))` in float32: no decay is below `lower_bound`.

    Source: released code of Kimi Delta Attention, its safe gate.
    """
    flat, rate = _flat(logits, log_rate, bias)
    return (lower_bound * jax.nn.sigmoid(rate * flat)).reshape(logits.shape)


def _flat(logits: Array, log_rate: Array, bias: Array) -> tuple[Array, Array]:
    """Logits with their bias, and the rate of each: heads and channels side by side, or a TPU would lay them out anew."""
    flat = logits.reshape(*logits.shape[:2], -1).astype(jnp.float32) + bias.astype(jnp.float32)[None, None]
    rate = jnp.exp(log_rate.astype(jnp.float32))
    return flat, jnp.repeat(rate, flat.shape[2] // rate.shape[0])[None, None]


def initial_log_rate(key: PRNGKeyArray, heads: int, low: float = 0.0) -> Float[Array, " heads"]:
    """The logarithm of a number drawn uniformly from (low, 16]; never that of zero."""
    return jnp.log(16.0 - (16.0 - low) * jax.random.uniform(key, (heads,), jnp.float32))


def initial_step_bias(key: PRNGKeyArray, gates: int) -> Float[Array, " gates"]:
    """The inverse softplus of a step drawn log-uniformly from [0.001, 0.1]."""
    low, high = math.log(0.001), math.log(0.1)
    step = jnp.exp(jax.random.uniform(key, (gates,), jnp.float32, low, high))
    return step + jnp.log(-jnp.expm1(-step))
