"""Language modelling as a task: windows of a corpus, split by document."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from delta_jax.config import check_fields
from delta_jax.data.config import DataConfig
from delta_jax.data.pipeline import split as split_documents
from delta_jax.data.tasks.draws import at_least
from delta_jax.data.tasks.examples import Examples, Split
from delta_jax.data.tokenizer import load_tokenizer

__all__ = ["Corpus"]


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """The next token at every position of random windows of a corpus; tested on documents that training never saw.

    Layout: the documents of a split one after the other, an id of the tokenizer between them (`DataConfig`); a sequence is
    any `length` tokens of that, and its targets are the tokens that follow. Which document a window comes from decides the
    split, so two splits share what their documents share: licences and other boilerplate.

    The corpus is held in memory.

    Attributes:
        data: the corpus, its tokenizer and its split. The default is the source of Python's standard library in bytes,
            where bits are bits per byte but for the one in thousands that ends a document.
        length: T.

    Examples:
        >>> import json
        >>> task = Corpus(data=DataConfig(path=json.__path__[0] + "/*.py"), length=16)
        >>> examples = draw(task, 3, split="test", seed=0)
        >>> bool((examples.inputs[:, 1:] == examples.targets[:, :-1]).all())
        True
    """

    data: DataConfig = field(default_factory=DataConfig)
    length: int = 256

    def __post_init__(self) -> None:
        check_fields(self)
        at_least(self, length=1)

    @property
    def vocab_size(self) -> int:
        """That of the tokenizer."""
        return load_tokenizer(self.data.tokenizer).vocab_size

    @property
    def chance(self) -> float:
        """Of a token drawn uniformly."""
        return 1 / self.vocab_size

    def sample(self, rng: np.random.Generator, number: int, split: Split) -> Examples:
        """See `Task.sample`.

        Raises:
            ValueError: the corpus cannot be read, or the split is not longer than a sequence.
        """
        tokens = _stream(self.data, split)
        if len(tokens) <= self.length:
            raise ValueError(
                f"length must be less than the {len(tokens)} tokens of the {split} split, got {self.length}"
            )
        first = rng.integers(0, len(tokens) - self.length, (number, 1))
        windows = tokens[first + np.arange(self.length + 1)].astype(np.int32)
        identity = np.full(number, split != "test", np.uint64)
        return Examples(windows[:, :-1], windows[:, 1:], identity=identity)

    def to_dict(self) -> dict[str, Any]:
        """The fields, and size and digest of either split: what the numbers of another machine can be compared by."""
        return {"data": self.data, "length": self.length} | {
            split: {"tokens": len(_stream(self.data, split)), "sha256": _digest(self.data, split)}
            for split in ("train", "test")
        }


@functools.lru_cache(maxsize=4)
def _stream(data: DataConfig, split: Split) -> np.ndarray:
    """All tokens of a split."""
    tokenizer = load_tokenizer(data.tokenizer)
    documents = split_documents(data)[split == "test"]
    kind = np.uint16 if tokenizer.vocab_size <= 2**16 else np.int32
    edge = np.array([tokenizer.document_id], kind)
    parts = [edge]
    for index in range(len(documents)):
        text = documents[index]
        assert text is not None  # grain's word for what a filter took out, and there is none
        parts += [tokenizer.encode(text).astype(kind), edge]
    tokens = np.concatenate(parts)
    tokens.setflags(write=False)
    return tokens


@functools.lru_cache(maxsize=4)
def _digest(data: DataConfig, split: Split) -> str:
    return hashlib.sha256(_stream(data, split).astype("<i4").tobytes()).hexdigest()[:16]
