"""Text corpora as exact, resumable streams of packed training rows (on grain)."""

from delta_jax.data.bigram import bigram_bits_per_byte
from delta_jax.data.config import DataConfig
from delta_jax.data.pipeline import Batch, split, train_batches, validation_batches, validation_bytes
from delta_jax.data.sources import Documents, load_documents
from delta_jax.data.tokenizer import ByteTokenizer, JsonTokenizer, Tokenizer, load_tokenizer

__all__ = [
    "Batch",
    "ByteTokenizer",
    "DataConfig",
    "Documents",
    "JsonTokenizer",
    "Tokenizer",
    "bigram_bits_per_byte",
    "load_documents",
    "load_tokenizer",
    "split",
    "train_batches",
    "validation_batches",
    "validation_bytes",
]
