"""Text as it is written: characters are shown when they are whole, and a text ends before its stop strings."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, SupportsIndex, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int

from delta_jax.inference.reading import is_sequence

__all__ = ["Decoder", "Detokenizer", "Finish", "Piece", "Row", "stop_strings"]

type Finish = Literal["stop", "length"]

_UNKNOWN = "\ufffd"  # what bytes that are not UTF-8, or not yet, are decoded as
_CHARACTER = 4  # tokens that one character takes at most: bytes of UTF-8
_CONTEXT = 8  # tokens before a text that say how its first one is written


@runtime_checkable
class Decoder(Protocol):
    """What generation needs of a tokenizer; those of `delta_jax.data` need packages that generation does not."""

    def encode(self, text: str) -> Sequence[int] | Int[np.ndarray, " tokens"]:
        """Token ids of a text."""
        ...

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """Text of the ids."""
        ...


@dataclass(frozen=True)
class Piece:
    """What is new in a row.

    Attributes:
        tokens: its new tokens; those whose text is not yet certain come with a later piece.
        text: its new text; "" without a tokenizer.
        finish: "stop" if the row has ended at a stop token or stop string, "length" if at the limit of new tokens; None
            while it goes on.

    Examples:
        >>> Piece([72, 105], "Hi", "stop").text
        'Hi'
    """

    tokens: list[int]
    text: str
    finish: Finish | None


class Detokenizer:
    """The text of tokens as they come: the pieces together are the tokenizer's text of all tokens.

    A character that several tokens share comes with the last of them. Only the last few tokens are decoded again for each
    new one, always after tokens whose text is known, so that spaces between tokens are those of the whole.

    Args:
        tokenizer: whose text it is.
        before: the tokens before.

    Examples:
        >>> text = Detokenizer(ByteTokenizer())
        >>> [text.add(byte) for byte in "né".encode()]
        ['n', '', 'é']
    """

    def __init__(self, tokenizer: Decoder, before: Sequence[int] | Int[np.ndarray, " _"] = ()):
        self._decode = tokenizer.decode
        count = _CONTEXT
        # Enough to have text, and not to begin inside a character.
        while count < len(before) and (not (text := self._decode(before[-count:])) or _UNKNOWN in text):
            count *= 2
        self._tokens = [int(token) for token in before[-count:]]
        self._known = len(self._tokens)

    def add(self, token: int) -> str:
        """The text that is certain now and was not before."""
        self._tokens.append(token)
        end, text = len(self._tokens), self._decode(self._tokens)
        if text.endswith(_UNKNOWN):
            if end - self._known <= 2 * _CHARACTER:
                return ""
            # So many are no character: all but the last few will never be text.
            end -= _CHARACTER
            text = self._decode(self._tokens[:end])
        return self._advance(end, text)

    def end(self) -> str:
        """The text of what is left, in which an unfinished character shows as the replacement character."""
        return self._advance(len(self._tokens), self._decode(self._tokens))

    def _advance(self, end: int, text: str) -> str:
        before = self._decode(self._tokens[: self._known])
        new = text[len(before) :] if text.startswith(before) else self._decode(self._tokens[self._known : end])
        if new:
            self._tokens, self._known = self._tokens[self._known :], end - self._known
        return new


class Row:
    """One row of a batch as it is written.

    Args:
        stop_ids: [V], which tokens end it.
        stop: texts that end it.
        limit: how many tokens it may have.
        detokenizer: makes its text; None makes none.

    Attributes:
        finish: as in `Piece`.
    """

    def __init__(
        self, stop_ids: Bool[np.ndarray, " vocab"], stop: tuple[str, ...], limit: int, detokenizer: Detokenizer | None
    ):
        self._stop_ids, self._stop, self._limit, self._detokenizer = stop_ids, stop, limit, detokenizer
        self._tokens: list[int] = []
        self._ends: list[int] = []  # the length of the text with each token, of those whose text is certain
        self._text = ""
        self._shown = (0, 0)  # tokens and characters
        self.finish: Finish | None = None

    def add(self, tokens: Iterable[int]) -> Piece:
        """Takes the tokens of a block; those after the end are ignored."""
        for token in tokens if self.finish is None else ():
            if self._stop_ids[token]:
                self.finish = "stop"
            else:
                self._tokens.append(token)
                self._write("" if self._detokenizer is None else self._detokenizer.add(token))
                if self.finish is None and len(self._tokens) == self._limit:
                    self.finish = "length"
            if self.finish is not None:
                break
        return self._piece()

    def _write(self, new: str) -> None:
        """Adds to the text, and ends it before the first stop string."""
        if not new and self._detokenizer is not None:
            return
        from_here = max(0, len(self._text) - max(map(len, self._stop), default=0) + 1)
        self._text += new
        self._ends += [len(self._text)] * (len(self._tokens) - len(self._ends))
        found = [place for stop in self._stop if (place := self._text.find(stop, from_here)) >= 0]
        if found:
            self.finish, self._text = "stop", self._text[: min(found)]
            self._ends = [end for end in self._ends if end <= len(self._text)]
            self._tokens = self._tokens[: len(self._ends)]

    def _piece(self) -> Piece:
        if self.finish is not None and self._detokenizer is not None and len(self._ends) < len(self._tokens):
            rest = self._detokenizer.end()
            self._write(rest)
            self._ends += [len(self._text)] * (len(self._tokens) - len(self._ends))
        tokens, characters = self._shown
        certain = len(self._text)
        if self.finish is None:
            certain -= max((_begun(self._text, stop) for stop in self._stop), default=0)
        known = len(self._ends)
        while known > tokens and self._ends[known - 1] > certain:
            known -= 1
        self._shown = known, certain
        return Piece(self._tokens[tokens:known], self._text[characters:certain], self.finish)


def stop_strings(stop: str | Sequence[str] | None, tokenizer: Decoder | None) -> tuple[str, ...]:
    """The texts that end a row, or a ValueError that says what is wrong."""
    if tokenizer is not None and not isinstance(tokenizer, Decoder):
        raise ValueError(f"tokenizer must be one, as load_tokenizer makes it, got {tokenizer!r}")
    stops: Any = () if stop is None else (stop,) if isinstance(stop, str) else stop
    if not is_sequence(stops) or not all(isinstance(text, str) and text for text in stops):
        raise ValueError(f"stop must be a text or several, none of them empty, got {stop!r}")
    if stops and tokenizer is None:
        raise ValueError("tokenizer must be given with stop, it makes the text in which stop is looked for")
    return tuple(stops)


def _begun(text: str, stop: str) -> int:
    """How many characters at the end of the text may be the beginning of a stop string."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
