"""Pure functions on arrays: the delta rule, its recurrent and chunkwise forms, padding, and states of segments."""

from delta_jax.ops.api import (
    delta_product,
    delta_product_step,
    delta_rule,
    delta_rule_step,
    linear_attention,
    linear_attention_step,
)
from delta_jax.ops.implementations import implementations
from delta_jax.ops.padding import skip_tokens
from delta_jax.ops.segments import segment_states

__all__ = [
    "delta_product",
    "delta_product_step",
    "delta_rule",
    "delta_rule_step",
    "implementations",
    "linear_attention",
    "linear_attention_step",
    "segment_states",
    "skip_tokens",
]
