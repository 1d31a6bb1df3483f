"""Text corpora as exact, resumable streams of packed training rows (on grain)."""

import hashlib
import json
from pathlib import Path
from typing import Any

from delta_jax.data.bigram import bigram_bits_per_byte
from delta_jax.data.config import DataConfig
from delta_jax.data.pipeline import Batch, split, train_batches, validation_batches, validation_bytes
from delta_jax.data.sources import Documents, load_documents
from delta_jax.data.tokenizer import ByteTokenizer, JsonTokenizer, Tokenizer, load_tokenizer

__all__ = [
    "Batch",
    "ByteTokenizer",
    "DataConfig",
    "DataError",
    "Documents",
    "JsonTokenizer",
    "Tokenizer",
    "bigram_bits_per_byte",
    "differences",
    "fingerprint",
    "load_documents",
    "load_tokenizer",
    "split",
    "train_batches",
    "validation_batches",
    "validation_bytes",
]


class DataError(ValueError):
    """A fault of a source or of a document; the message names file and line."""


def fingerprint(config: DataConfig) -> dict[str, Any]:
    """What tells a corpus and its tokenizer from others; JSON-able."""
    documents = load_documents(config)
    count = len(documents)
    sample = [documents[index] for index in (0, count // 2, count - 1)]
    tokenizer = config.tokenizer if config.tokenizer == "bytes" else Path(config.tokenizer).read_text()
    return {
        "documents": count,
        "sample": hashlib.sha256(json.dumps(sample).encode()).hexdigest(),
        "tokenizer": hashlib.sha256(tokenizer.encode()).hexdigest(),
    }


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What differs between two fingerprints, a sentence each."""
    return [f"{key}: {old.get(key)} then, {new.get(key)} now" for key in new if old.get(key) != new[key]]
