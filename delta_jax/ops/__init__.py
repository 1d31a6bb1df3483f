"""Pure functions on arrays: the delta rule, its recurrent and chunkwise forms, and the short convolution."""

from delta_jax.ops.api import (
    delta_product,
    delta_product_step,
    delta_rule,
    delta_rule_step,
    implementations,
    linear_attention,
    linear_attention_step,
)

__all__ = [
    "delta_product",
    "delta_product_step",
    "delta_rule",
    "delta_rule_step",
    "implementations",
    "linear_attention",
    "linear_attention_step",
]
