"""The architectures that are read and written, and those that are known but not expressible, by their model_type."""

from delta_jax.interop.architectures import (
    apriel2,
    bailing_hybrid,
    fla,
    hybrid_qwen3,
    kimi_linear,
    lara_mini,
    llama,
    olmo_hybrid,
    qwen3_5,
    qwen3_next,
)
from delta_jax.interop.architectures.common import Architecture

__all__ = ["ARCHITECTURES", "INEXPRESSIBLE"]

ARCHITECTURES: dict[str, Architecture] = {
    "qwen3_next": qwen3_next.ARCHITECTURE,
    "qwen3_5": qwen3_5.DENSE,
    "qwen3_5_text": qwen3_5.DENSE,
    "qwen3_5_moe": qwen3_5.SPARSE,
    "qwen3_5_moe_text": qwen3_5.SPARSE,
    "olmo_hybrid": olmo_hybrid.ARCHITECTURE,
    "kimi_linear": kimi_linear.ARCHITECTURE,
    "bailing_hybrid": bailing_hybrid.ARCHITECTURE,
    "lara_mini": lara_mini.ARCHITECTURE,
    **llama.ARCHITECTURES,
    "hybrid_qwen3": hybrid_qwen3.ARCHITECTURE,
    "apriel2": apriel2.ARCHITECTURE,
    "apriel2_text": apriel2.ARCHITECTURE,
    **fla.ARCHITECTURES,
}
# What of their function this library does not have.
INEXPRESSIBLE: dict[str, str] = {
    "glm5_next": "its attention picks tokens by an indexer, and its residual stream is made of hyper-connections",
    "jet_nemotron": "the kernels of its convolutions depend on the input",
    "kimi_k3": "its residual stream attends to earlier layers, and its experts work on a latent space",
    "mom": "a router gives each token to some of several states",
    "nemotron_flash": "memory_tokens, learned vectors before every sequence, have no place in packed rows, and its logits "
    "are divided by the lengths of the head's rows",
    "qwen4_exp": "it has a table of n-grams, hyper-connections, and attention that picks tokens by an indexer",
    "rwkv7": "its mixers and its feed-forward layers mix each token with the one before it",
}
