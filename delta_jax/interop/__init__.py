"""Published models in and out: checkpoints of Hugging Face transformers and of flash-linear-attention."""

from delta_jax.interop.checkpoint import COMPANIONS, Checkpoint, open_checkpoint
from delta_jax.interop.read import load_pretrained
from delta_jax.interop.write import save_pretrained

__all__ = ["COMPANIONS", "Checkpoint", "load_pretrained", "open_checkpoint", "save_pretrained"]
