"""What a corpus is and how it becomes a stream of training rows."""

from __future__ import annotations

from dataclasses import dataclass

FORMATS = ("auto", "text", "jsonl", "parquet", "arrayrecord", "huggingface")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """A corpus, its tokenizer and its split.

    Args:
        path: "stdlib" for the embedded corpus (the source of the running Python's standard library), else a
            file, a folder (searched recursively) or a glob. A folder that is really called stdlib:
            "./stdlib".
        format: one of `FORMATS`; "auto" tells it from the suffixes or from the folder's contents.
        text_field: the field or column that holds the text (JSONL, Parquet, Hugging Face, JSON ArrayRecords).
        tokenizer: "bytes", or the path of a tokenizer.json.
        validation_fraction: share of the documents (not of the bytes) held out for validation, in (0, 1); at
            least one document is held out and at least one is trained on.
        seed: decides the split and the order of the documents, in [0, 2^32).
        shuffle_rows: rows are drawn at random from a window of this many, so that the rows of one long
            document do not follow each other; 1 keeps the packing order. The window lives in memory.
    """

    path: str = "stdlib"
    format: str = "auto"
    text_field: str = "text"
    tokenizer: str = "bytes"
    validation_fraction: float = 0.05
    seed: int = 0
    shuffle_rows: int = 2048

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"format must be one of {', '.join(FORMATS)}; got {self.format!r}.")
        if not 0.0 < self.validation_fraction < 1.0:
            raise ValueError(f"validation_fraction must lie strictly between 0 and 1; got {self.validation_fraction}.")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must lie in [0, 2^32); got {self.seed}.")
        if self.shuffle_rows < 1:
            raise ValueError(f"shuffle_rows must be at least 1; got {self.shuffle_rows}.")
