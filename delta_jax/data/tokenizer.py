"""Text to token ids and back: raw bytes, or any tokenizer.json."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import numpy as np
from jaxtyping import Int32

# A tokenizer.json does not say which special token separates documents: the first of these that it has.
DOCUMENT_TOKENS = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|eos|>",
    "<eos>",
    "</s>",
    "[EOS]",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "<|begin_of_text|>",
    "<|bos|>",
    "<bos>",
    "<s>",
    "[BOS]",
    "[SEP]",
)


class Tokenizer(Protocol):
    """What the pipeline and the command line need of a tokenizer.

    Attributes:
        vocab_size: one more than the largest id.
        document_id: the id that opens and closes every document.
    """

    vocab_size: int
    document_id: int

    def encode(self, text: str) -> Int32[np.ndarray, " tokens"]:
        """Token ids of a text, without any special token added."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; ids that stand for no text, such as `document_id`, are left out."""
        ...


class ByteTokenizer:
    """The 256 byte values and the document id 256."""

    vocab_size = 257
    document_id = 256

    def encode(self, text: str | bytes) -> Int32[np.ndarray, " tokens"]:
        """The UTF-8 bytes of a text, or the bytes given."""
        data = text.encode() if isinstance(text, str) else text
        return np.frombuffer(data, np.uint8).astype(np.int32)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Exactly the bytes of the ids; 256 and above stand for none (a padded vocabulary has such ids)."""
        return bytes(value for value in map(int, ids) if value < 256)

    def decode(self, ids: Iterable[int]) -> str:
        """For display: bytes that are not UTF-8 show as the replacement character."""
        return self.decode_bytes(ids).decode(errors="replace")


class JsonTokenizer:
    """A tokenizer.json; its document id is the first of `DOCUMENT_TOKENS` among its special tokens."""

    def __init__(self, path: str | Path) -> None:
        import tokenizers

        if not Path(path).is_file():
            raise ValueError(f"data.tokenizer: no such file: {str(path)!r} (want 'bytes' or a tokenizer.json).")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"data.tokenizer: {path} is not a tokenizer.json: {error}") from None
        special = {
            token.content: index for index, token in self._tokenizer.get_added_tokens_decoder().items() if token.special
        }
        found = [token for token in DOCUMENT_TOKENS if token in special]
        if not found:
            raise ValueError(
                f"data.tokenizer: {path} has no special token to separate documents; wanted one of "
                f"{', '.join(DOCUMENT_TOKENS)}; it has {', '.join(special) or 'none'}."
            )
        self.document_id: int = special[found[0]]
        self.vocab_size: int = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str) -> Int32[np.ndarray, " tokens"]:
        """Token ids of a text, without any special token added."""
        return np.asarray(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids, special tokens left out."""
        return str(self._tokenizer.decode([int(value) for value in ids], skip_special_tokens=True))


def load_tokenizer(name: str) -> Tokenizer:
    """Returns the tokenizer that a configuration names.

    Args:
        name: "bytes", or the path of a tokenizer.json.

    Raises:
        ValueError: no such file, not a tokenizer.json, or no special token that can separate documents.
    """
    return ByteTokenizer() if name == "bytes" else JsonTokenizer(name)
