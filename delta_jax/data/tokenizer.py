"""Text to token ids and back: raw bytes, or any tokenizer.json."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol, SupportsIndex, runtime_checkable

import numpy as np
from jaxtyping import Int32

from delta_jax.data.records import lone_surrogate

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


@runtime_checkable
class Tokenizer(Protocol):
    """What the pipeline and the command line need of a tokenizer.

    Attributes:
        vocab_size: one more than the largest id.
        document_id: the id that opens and closes every document.
    """

    vocab_size: int
    document_id: int

    def encode(self, text: str) -> Int32[np.ndarray, " tokens"]:
        """Token ids of a text, without any special token: text that reads like one is text."""
        ...

    def encode_with_bytes(self, text: str) -> tuple[Int32[np.ndarray, " tokens"], Int32[np.ndarray, " tokens"]]:
        """Token ids, and the bytes of text that each of them stands for.

        A token stands for the text from the end of the tokens before it to its own end (both as the tokenizer tells
        them, which where it drops characters inside a word it may do by a character too few). So a character that several
        tokens share is that of the first of them, and text that no token covers that of the next; what follows the
        last token is nobody's here, and the pipeline gives it to the document id that closes the document. The sum
        over a document is exact.
        """
        ...

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """Text of the ids; ids that stand for no text, such as `document_id`, are left out."""
        ...


class ByteTokenizer:
    """The 256 byte values and the document id 256.

    Examples:
        >>> tokenizer = ByteTokenizer()
        >>> tokenizer.encode("delta").tolist()
        [100, 101, 108, 116, 97]
        >>> tokenizer.decode([100, 101, 108, 116, 97])
        'delta'
    """

    vocab_size = 257
    document_id = 256

    def encode(self, text: str | bytes) -> Int32[np.ndarray, " tokens"]:
        """The UTF-8 bytes of a text, or the bytes given."""
        data = _checked(text).encode() if isinstance(text, str) else text
        return np.frombuffer(data, np.uint8).astype(np.int32)

    def encode_with_bytes(self, text: str | bytes) -> tuple[Int32[np.ndarray, " tokens"], Int32[np.ndarray, " tokens"]]:
        """The bytes, each of which stands for one."""
        ids = self.encode(text)
        return ids, np.ones_like(ids)

    def decode_bytes(self, ids: Iterable[SupportsIndex]) -> bytes:
        """Exactly the bytes of the ids; 256 and above stand for none (a padded vocabulary has such ids)."""
        return bytes(value for value in map(int, ids) if value < 256)

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """For display: bytes that are not UTF-8 show as the replacement character."""
        return self.decode_bytes(ids).decode(errors="replace")


class JsonTokenizer:
    """A tokenizer.json; its document id is the first of `DOCUMENT_TOKENS` among its special tokens.

    Nothing in a text becomes a special token, and no text is cut off: truncation and padding, which a tokenizer.json
    may ask for, are off.

    Examples:
        >>> from tokenizers import Tokenizer, models
        >>> tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "delta": 1}, unk_token="<unk>"))
        >>> _ = tokenizer.add_special_tokens(["<|endoftext|>"])
        >>> tokenizer.save("tokenizer.json")
        >>> JsonTokenizer("tokenizer.json").document_id
        2
    """

    def __init__(self, path: str | Path) -> None:
        if not Path(path).is_file():
            raise ValueError(f"data.tokenizer: no such file: {str(path)!r} (want 'bytes' or a tokenizer.json).")
        stat = Path(path).stat()
        try:
            self._stamp = stat.st_mtime_ns, stat.st_size
            self._tokenizer, special, unknown = _read(str(path), *self._stamp)
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"data.tokenizer: {path} is not a tokenizer.json: {error}") from None
        found = [token for token in DOCUMENT_TOKENS if token in special]
        if not found:
            raise ValueError(
                f"data.tokenizer: {path} has no special token to separate documents; wanted one of "
                f"{', '.join(DOCUMENT_TOKENS)}; it has {', '.join(special) or 'none'}."
            )
        self._path = str(path)
        longest_first = sorted(special, key=len, reverse=True)
        self._written = re.compile(f"(?:{'|'.join(map(re.escape, longest_first))})(?!{_SHIELD})")
        self.document_id: int = special[found[0]]
        self.vocab_size: int = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        # The unknown token is special and may stand for text; not where it also separates documents.
        self._never = np.zeros(self.vocab_size, bool)
        self._never[[id for token, id in special.items() if token != unknown or id == self.document_id]] = True

    def encode(self, text: str) -> Int32[np.ndarray, " tokens"]:
        """Token ids of a text, without any special token: text that reads like one is text.

        Raises:
            ValueError: a lone surrogate, which is no text, or text that the tokenizer has only a special token for.
        """
        return self._ids(self._tokenizer.encode(_checked(text), add_special_tokens=False))

    def encode_with_bytes(self, text: str) -> tuple[Int32[np.ndarray, " tokens"], Int32[np.ndarray, " tokens"]]:
        """See `Tokenizer.encode_with_bytes`."""
        encoding = self._tokenizer.encode(_checked(text), add_special_tokens=False)
        ends = np.asarray([end for _, end in encoding.offsets], np.int64)
        covered = _bytes_before(text)[np.maximum.accumulate(ends)]
        return self._ids(encoding), np.diff(covered, prepend=0).astype(np.int32)

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """Text of the ids, special tokens left out."""
        return str(self._tokenizer.decode([int(value) for value in ids], skip_special_tokens=True))

    def encode_special(
        self, text: str
    ) -> tuple[Int32[np.ndarray, " tokens"], Int32[np.ndarray, " tokens"], Int32[np.ndarray, " tokens"]]:
        """Token ids of a text in which special tokens are written out, as a chat template writes them.

        What reads like a special token is one, unless `shield` went over it: then it is text like any other.

        Returns:
            The ids; the bytes of text that each stands for, none for special tokens; the character each begins at.

        Raises:
            ValueError: a lone surrogate.
        """
        marked, origins, sizes = _marked(_checked(text), self._written)
        encoding = _with_special(self._path, *self._stamp).encode(marked, add_special_tokens=False)
        offsets = np.asarray(encoding.offsets, np.int64).reshape(-1, 2)
        covered = sizes[np.maximum.accumulate(offsets[:, 1])]
        bytes_of = np.diff(covered, prepend=0).astype(np.int32)
        return np.asarray(encoding.ids, np.int32), bytes_of, origins[offsets[:, 0]].astype(np.int32)

    def shield(self, text: str) -> str:
        """The text, marked so that `encode_special` takes nothing in it for a special token."""
        return self._written.sub(lambda found: "".join(character + _SHIELD for character in found[0]), text)

    def _ids(self, encoding: Any) -> Int32[np.ndarray, " tokens"]:
        ids = np.asarray(encoding.ids, np.int32)
        if self._never[ids].any():
            token = self._tokenizer.id_to_token(int(ids[self._never[ids]][0])).removeprefix(_MARK)
            raise ValueError(f"data.tokenizer: {self._path} turns text into its special token {token}.")
        return ids


def load_tokenizer(name: str) -> Tokenizer:
    """Returns the tokenizer that a configuration names.

    Args:
        name: "bytes", or the path of a tokenizer.json.

    Raises:
        ValueError: no such file, not a tokenizer.json, or no special token that can separate documents.

    Examples:
        >>> load_tokenizer("bytes").vocab_size
        257
    """
    return ByteTokenizer() if name == "bytes" else JsonTokenizer(name)


_MARK = "\ufdd0"  # not a character, so that no text has a reason to hold it
_SHIELD = "\ufdd1"  # likewise


@functools.lru_cache(maxsize=2)
def _read(path: str, modified: int, size: int) -> tuple[Any, dict[str, int], str | None]:
    """The library's tokenizer, the ids of the special tokens, and which of them stands for what is unknown.

    `encode_special_tokens` keeps special tokens from being cut out of a text. But they are in the model's vocabulary
    too, where a Unigram, a WordPiece, a word or a BPE that takes whole words finds them again; so there they get a name
    that no text holds.
    """
    import tokenizers

    table = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    added = [token for token in table.get("added_tokens") or [] if token["special"]]
    names = {token["content"] for token in added}
    for token in added:
        token["content"] = _MARK + token["content"]

    def rename(token: str) -> str:
        return _MARK + token if token in names else token

    model = table["model"]
    unknown = model.get("unk_token")
    if isinstance(model["vocab"], dict):
        model["vocab"] = {rename(token): id for token, id in model["vocab"].items()}
    else:
        unknown = None if model.get("unk_id") is None else model["vocab"][model["unk_id"]][0]
        model["vocab"] = [[rename(token), score] for token, score in model["vocab"]]
    if model.get("unk_token") is not None:
        model["unk_token"] = rename(model["unk_token"])
    if "merges" in model:
        pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
        model["merges"] = [list(pair) for pair in pairs if "".join(pair) not in names and not names & set(pair)]
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(table))
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer, {token["content"].removeprefix(_MARK): token["id"] for token in added}, unknown


@functools.lru_cache(maxsize=2)
def _with_special(path: str, modified: int, size: int) -> Any:
    """The library's tokenizer as `_read` has it, but that marked special tokens are cut out of a text."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_str(_read(path, modified, size)[0].to_str())
    tokenizer.encode_special_tokens = False
    return tokenizer


def _marked(text: str, written: re.Pattern[str]) -> tuple[str, np.ndarray, np.ndarray]:
    """The text with its special tokens marked and without shields; of each character there, and the end, where it was and
    the bytes of text before it."""
    parts: list[str] = []
    origins: list[np.ndarray] = []
    counted: list[np.ndarray] = [np.zeros(0, bool)]

    def add(part: str, start: int, counts: bool) -> None:
        places = np.asarray([place for place, character in enumerate(part) if character != _SHIELD], np.int64)
        parts.append(part.replace(_SHIELD, ""))
        origins.append(places + start)
        counted.append(np.full(len(places), counts))

    end = 0
    for found in written.finditer(text):
        add(text[end : found.start()], end, True)
        parts.append(_MARK)
        origins.append(np.asarray([found.start()]))
        counted.append(np.zeros(1, bool))
        add(found[0], found.start(), False)
        end = found.end()
    add(text[end:], end, True)
    marked = "".join(parts)
    widths = np.diff(_bytes_before(marked)) * np.concatenate(counted)
    return marked, np.concatenate([*origins, [len(text)]]), np.concatenate([[0], np.cumsum(widths)])


def _checked(text: str) -> str:
    if (lone := lone_surrogate(text)) is not None:
        raise ValueError(f"text: character {lone} is U+{ord(text[lone]):04X}, half of a surrogate pair, and no text.")
    return text


def _bytes_before(text: str) -> np.ndarray:
    """UTF-8 bytes before each character, and of the whole."""
    if text.isascii():
        return np.arange(len(text) + 1)
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    return np.concatenate([[0], np.cumsum(1 + (points >= 0x80) + (points >= 0x800) + (points >= 0x10000))])
