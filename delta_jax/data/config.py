"""What a corpus is and how it becomes a stream of training rows."""

from __future__ import annotations

from dataclasses import dataclass

from delta_jax.config import check_fields

ON_ERROR = ("stop", "skip")
RECORDS = ("text", "completion", "messages")
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
        records: what a record holds. "text", a document in `text_field`, all of which is learnt; "completion", a text in
            "prompt" and one in "completion"; "messages", a conversation: a list of objects with "role" and "content", which
            the chat template beside the tokenizer.json writes. Of these two the completion and the turns of the assistant
            alone are learnt, with the token that ends them, and each stands in one row: what is longer than a row is cut
            off at its end, and left out and counted where no token to learn is left. A template that asks for the day is
            told 2025-01-01.
        tokenizer: "bytes", or the path of a tokenizer.json.
        validation_fraction: share of the documents (not of the bytes) held out for validation, in (0, 1). A hash of
            the seed and the document's text decides, so that a document never changes sides however the corpus
            grows or is ordered, and equal documents are on one side; of n documents this share is held out give
            or take the root of n times it. Where that would be none the document whose hash is lowest is held out
            (alone it may move, to training, when the corpus grows); where it would be all, that is an error.
        seed: decides the split and the order of the documents, in [0, 2^32).
        shuffle_rows: rows are drawn at random from a window of this many, so that the rows of one long
            document do not follow each other; 1 keeps the packing order. The window lives in memory.
        on_error: what a document that cannot be read does, or a file: "stop" raises a `DataError`, "skip" leaves
            it out and counts it. Documents without a character are left out in any case.

    Examples:
        >>> DataConfig(path="corpus/*.jsonl", text_field="body", validation_fraction=0.1).tokenizer
        'bytes'
    """

    path: str = "stdlib"
    format: str = "auto"
    text_field: str = "text"
    records: str = "text"
    tokenizer: str = "bytes"
    validation_fraction: float = 0.05
    seed: int = 0
    shuffle_rows: int = 2048
    on_error: str = "stop"

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.path:
            raise ValueError('path must name a corpus; got "".')
        if self.on_error not in ON_ERROR:
            raise ValueError(f"on_error must be one of {', '.join(ON_ERROR)}; got {self.on_error!r}.")
        if self.records not in RECORDS:
            raise ValueError(f"records must be one of {', '.join(RECORDS)}; got {self.records!r}.")
        if self.format not in FORMATS:
            raise ValueError(f"format must be one of {', '.join(FORMATS)}; got {self.format!r}.")
        if not 0.0 < self.validation_fraction < 1.0:
            raise ValueError(f"validation_fraction must lie strictly between 0 and 1; got {self.validation_fraction}.")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must lie in [0, 2^32); got {self.seed}.")
        if self.shuffle_rows < 1:
            raise ValueError(f"shuffle_rows must be at least 1; got {self.shuffle_rows}.")
