"""Text corpora as exact, resumable streams of packed training rows (on grain)."""

from delta_jax.data.bigram import bigram_bits_per_byte
from delta_jax.data.chat import ChatTemplate, load_chat_template
from delta_jax.data.config import DataConfig
from delta_jax.data.fingerprint import differences, fingerprint
from delta_jax.data.pipeline import Batch, TrainBatches, split, train_batches, validation_batches, validation_bytes
from delta_jax.data.records import DataError
from delta_jax.data.sources import Documents, load_documents
from delta_jax.data.tokenizer import ByteTokenizer, JsonTokenizer, Tokenizer, load_tokenizer

__all__ = [
    "Batch",
    "ByteTokenizer",
    "ChatTemplate",
    "DataConfig",
    "DataError",
    "Documents",
    "JsonTokenizer",
    "Tokenizer",
    "TrainBatches",
    "bigram_bits_per_byte",
    "differences",
    "fingerprint",
    "load_chat_template",
    "load_documents",
    "load_tokenizer",
    "split",
    "train_batches",
    "validation_batches",
    "validation_bytes",
]
