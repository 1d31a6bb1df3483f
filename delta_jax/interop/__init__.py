"""Published models in and out: checkpoints of Hugging Face transformers and of flash-linear-attention."""

from delta_jax.interop.read import load_pretrained
from delta_jax.interop.write import save_pretrained

__all__ = ["load_pretrained", "save_pretrained"]
