"""The byte bigram: what a model must beat to have learnt more than letter pairs."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from jaxtyping import Float64, Int64

from delta_jax.config import convert
from delta_jax.data.config import DataConfig
from delta_jax.data.examples import require_text
from delta_jax.data.splitting import Side, SplitCorpus

_SYMBOLS = 257  # byte values and the document boundary
_BOUNDARY = 256
_ALPHAS = np.geomspace(1e-4, 10.0, 26)


def bigram_bits_per_byte(config: DataConfig, *, training_bytes: int = 100_000_000) -> float:
    """Bits per byte of an add-alpha byte bigram, p(b | a) = (count(a, b) + alpha) / (count(a) + 257 alpha).

    It is measured as a language model is: every byte of every validation document, and the boundary that
    closes the document, predicted from the symbol before (the boundary before the first byte); the sum of
    -log2 p divided by the number of bytes. Counts come from the training split; alpha is the value that
    predicts the training counts best when each pair in turn is left out, so the validation split has no part
    in fitting.

    Args:
        config: the corpus; its tokenizer plays no role.
        training_bytes: stop counting after this many bytes of training documents.

    Returns:
        Bits per byte on the validation split.

    Raises:
        ValueError: the corpus cannot be read or holds no text, there is no document on a side, or training_bytes is no
            positive integer.

    Examples:
        >>> import json
        >>> 2.0 < bigram_bits_per_byte(DataConfig(path=json.__path__[0] + "/*.py")) < 8.0
        True
    """
    if convert(int, training_bytes, "training_bytes") < 1:
        raise ValueError(f"training_bytes must be at least 1; got {training_bytes}.")
    require_text(config, "a bigram has no prompt to go by")
    corpus = SplitCorpus(config)
    corpus.require("training")
    corpus.require("validation")
    counts, _ = _pair_counts(corpus, "training", training_bytes)
    seen = counts.sum(axis=1, keepdims=True)
    alpha = max(_ALPHAS, key=lambda value: _left_out_log_likelihood(counts, seen, float(value)))
    bits: Float64[np.ndarray, "a b"] = -np.log2((counts + alpha) / (seen + _SYMBOLS * alpha))
    tested, length = _pair_counts(corpus, "validation")
    return float((tested * bits).sum() / length)


def _pair_counts(corpus: SplitCorpus, side: Side, limit: int | None = None) -> tuple[Int64[np.ndarray, "a b"], int]:
    """Counts of adjacent symbols and the number of bytes."""
    counts, total = np.zeros(_SYMBOLS**2, np.int64), 0
    for symbols in _joined(text.encode() for _, text in corpus.texts(side)):
        counts += np.bincount(symbols[:-1] * _SYMBOLS + symbols[1:], minlength=_SYMBOLS**2)
        total += int((symbols != _BOUNDARY).sum())
        if limit is not None and total >= limit:
            break
    return counts.reshape(_SYMBOLS, _SYMBOLS), total


def _joined(texts: Iterable[bytes], block: int = 1 << 20) -> Iterable[np.ndarray]:
    """Blocks of whole documents, one boundary between neighbours: it closes the one and opens the other."""
    boundary = np.array([_BOUNDARY])
    parts, size = [boundary], 0
    for text in texts:
        parts += [np.frombuffer(text, np.uint8).astype(np.int64), boundary]
        size += len(text)
        if size >= block:
            yield np.concatenate(parts)
            parts, size = [boundary], 0
    if len(parts) > 1:
        yield np.concatenate(parts)


def _left_out_log_likelihood(counts: np.ndarray, seen: np.ndarray, alpha: float) -> float:
    """Log likelihood of each training pair under the counts without that one pair."""
    rows, columns = np.nonzero(counts)
    count = counts[rows, columns]
    return float((count * np.log((count - 1 + alpha) / (seen[rows, 0] - 1 + _SYMBOLS * alpha))).sum())
