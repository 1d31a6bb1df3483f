"""Published models in and out: checkpoints of Hugging Face transformers and of flash-linear-attention."""

from delta_jax.interop.read import load_pretrained
from delta_jax.interop.runs import export_run, import_run
from delta_jax.interop.write import save_pretrained

__all__ = ["export_run", "import_run", "load_pretrained", "save_pretrained"]
