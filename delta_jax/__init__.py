"""delta_jax: the delta-rule family of linear transformers for JAX."""

from delta_jax.ops import (
    delta_product,
    delta_product_step,
    delta_rule,
    delta_rule_step,
    linear_attention,
    linear_attention_step,
)

__version__ = "0.1.0"
__all__ = [
    "__version__",
    "delta_product",
    "delta_product_step",
    "delta_rule",
    "delta_rule_step",
    "linear_attention",
    "linear_attention_step",
]
