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
    logits, rate = _biased(logits, bias), _rate(log_rate, logits)
    return -rate * jax.nn.softplus(logits)


def bounded_log_decay(
    logits: Float[Array, "batch time *gate"],
    log_rate: Float[Array, " heads"],
    bias: Float[Array, " gates"],
    lower_bound: float,
) -> Float[Array, "batch time *gate"]:
    """`lower_bound * sigmoid(exp(log_rate) * (logits + bias))` in float32: no decay is below `lower_bound`.

    Source: released code of Kimi Delta Attention, its safe gate.
    """
    logits, rate = _biased(logits, bias), _rate(log_rate, logits)
    return lower_bound * jax.nn.sigmoid(rate * logits)


def _biased(logits: Array, bias: Array) -> Array:
    return logits.astype(jnp.float32) + bias.astype(jnp.float32).reshape(1, 1, *logits.shape[2:])


def _rate(log_rate: Array, logits: Array) -> Array:
    return jnp.exp(log_rate.astype(jnp.float32)).reshape(1, 1, logits.shape[2], *(1,) * (logits.ndim - 3))


def initial_log_rate(key: PRNGKeyArray, heads: int, low: float = 0.0) -> Float[Array, " heads"]:
    """The logarithm of a number drawn uniformly from (low, 16]; never that of zero."""
    return jnp.log(16.0 - (16.0 - low) * jax.random.uniform(key, (heads,), jnp.float32))


def initial_step_bias(key: PRNGKeyArray, gates: int) -> Float[Array, " gates"]:
    """The inverse softplus of a step drawn log-uniformly from [0.001, 0.1]."""
    low, high = math.log(0.001), math.log(0.1)
    step = jnp.exp(jax.random.uniform(key, (gates,), jnp.float32, low, high))
    return step + jnp.log(-jnp.expm1(-step))
