"""The architectures that are read and written, by the model_type of their config.json."""

from delta_jax.interop.architectures import (
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

__all__ = ["ARCHITECTURES"]

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
    "llama": llama.LLAMA,
    "qwen3": llama.QWEN3,
    "hybrid_qwen3": hybrid_qwen3.ARCHITECTURE,
    **fla.ARCHITECTURES,
}
