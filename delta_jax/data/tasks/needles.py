"""Needles in a haystack, byte by byte, with RULER's texts."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, Literal

import numpy as np

from delta_jax.config import check_fields
from delta_jax.data.tasks.draws import at_least, distinct
from delta_jax.data.tasks.examples import IGNORED, Examples, Split
from delta_jax.data.tasks.words import ADJECTIVES, NOUNS
from delta_jax.data.tokenizer import ByteTokenizer

__all__ = ["Needles"]

_NOISE = b"The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
_DEPTHS = 40
_WORDS = np.array([[*f"{adjective}-{noun}".encode()] for adjective in ADJECTIVES for noun in NOUNS], np.uint8)
_NAMES = len(_WORDS)
_HEX = "0123456789abcdef"
_UUID = [_HEX] * 8 + ["-"] + [_HEX] * 4 + ["-", "4"] + [_HEX] * 3 + ["-", "89ab"] + [_HEX] * 3 + ["-"] + [_HEX] * 12


@dataclass(frozen=True, kw_only=True)
class Needles:
    """A number hidden in a long text under a name, asked for at the end, as bytes.

    A sequence is `DOCUMENT opening haystack question answer` without the answer's last byte; targets are the digits of the
    answer alone. In the haystack are `needles` sentences that each give a value to a name; the question has one of
    the names, its value is the answer. Names are `adjective-noun` and differ within a sequence. Names, values and the
    haystack have fixed sizes in bytes, so all sequences of a task are equally long and none is padded. Token ids are
    those of `ByteTokenizer`; DOCUMENT is its 256.

    Haystacks, and where needles stand in them:
        "noise": RULER's five short sentences, a line, over and over; needles before lines drawn at random. With one needle
            this is S-NIAH-1, the passkey.
        "needles": nothing but needles, as many as fit (`needles` is ignored): RULER's multi-key 2.
        "text": a stretch of `documents`, from the start of a sentence; needles at different ones of 40 depths evenly spaced
            from 0 to the end, each moved back to the start of the sentence. With one needle this is like S-NIAH-2, with
            `uuids` like S-NIAH-3, with four like multi-key 1; RULER's text is Paul Graham's essays. Train and test share
            the documents given: for unseen text make two tasks.

    Attributes:
        haystack: which.
        haystack_bytes: size of the text around the needles; the sequence is longer by everything else, see `length`.
        needles: how many, the one asked for among them; the others are distractors.
        digits: of a value; the first is not 0.
        uuids: values are random UUIDs (version 4), not numbers; `digits` is ignored.
        documents: the texts for "text", joined by line breaks.
        opening, needle, question: the texts. {kind} is "number" or "uuid", {key} the name, {value} the value; the answer
            follows the question after a space.

    Source: Hsieh et al., "RULER" (2024), section 3 and appendix B; lists of names are our own. The score there is whether
    the answer occurs in 128 greedy tokens, here whether each digit is the likeliest after the right ones before it.

    Examples:
        >>> task = Needles(haystack_bytes=64, digits=3, opening="", needle="{key}: {value}.", question="{key}?")
        >>> examples = draw(task, 2, split="train", seed=0)
        >>> (examples.targets != IGNORED).sum(axis=1).tolist()  # three digits each
        [3, 3]
    """

    haystack: Literal["noise", "needles", "text"] = "noise"
    haystack_bytes: int = 1024
    needles: int = 1
    digits: int = 7
    uuids: bool = False
    documents: tuple[str, ...] = field(default=(), repr=False)
    opening: str = (
        "A special magic {kind} is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the {kind} afterwards.\n"
    )
    needle: str = "One of the special magic {kind}s for {key} is: {value}."
    question: str = (
        "What is the special magic {kind} for {key} mentioned in the provided text? "
        "The special magic {kind} for {key} mentioned in the provided text is"
    )

    def __post_init__(self) -> None:
        check_fields(self)
        at_least(self, haystack_bytes=1, needles=1, digits=1)
        if self.haystack not in ("noise", "needles", "text"):
            raise ValueError(f"haystack must be noise, needles or text, got {self.haystack!r}")
        if "{key}" not in self.needle or self.needle.count("{value}") != 1:
            raise ValueError(f"needle must have a {{key}} and one {{value}}, got {self.needle!r}")
        if "{key}" not in self.question or "{value}" in self.question:
            raise ValueError(f"question must have a {{key}} and no {{value}}, got {self.question!r}")
        for name in ("opening", "needle", "question"):
            try:
                self._rendered(name)
            except (IndexError, KeyError, ValueError):
                raise ValueError(f"{name} has braces that it may not have, got {getattr(self, name)!r}") from None
        if bool(self.documents) != (self.haystack == "text"):
            raise ValueError(f'documents are for the haystack "text" and needed there, haystack is {self.haystack!r}')
        if self.haystack == "text" and len(self._text) < self.haystack_bytes:
            raise ValueError(f"documents must hold haystack_bytes, {self.haystack_bytes}, got {len(self._text)} bytes")
        if self.haystack == "needles" and not 1 <= self._number <= _NAMES:
            room = f"between 1 and {_NAMES} needles of {len(self._rendered('needle'))} bytes"
            raise ValueError(f"haystack_bytes must hold {room}, got {self.haystack_bytes}")
        most = {"noise": self._lines, "needles": _NAMES, "text": _DEPTHS}[self.haystack]
        if self.needles > most:
            raise ValueError(f"needles must be at most {most}, the places of this haystack, got {self.needles}")

    @property
    def vocab_size(self) -> int:
        return ByteTokenizer.vocab_size

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        hay = 0 if self.haystack == "needles" else self.haystack_bytes
        needles = self._number * len(self._rendered("needle"))
        return len(self._rendered("opening")) + hay + needles + len(self._rendered("question")) + len(self._alphabets)

    @property
    def chance(self) -> float:
        return float(np.mean([1 / len(alphabet) for alphabet in self._alphabets if len(alphabet) > 1]))

    def sample(self, rng: np.random.Generator, number: int, split: Split) -> Examples:
        rows = np.arange(number)
        names = _WORDS[distinct(rng, number, _NAMES, self._number)]
        values = np.empty((number, self._number, len(self._alphabets)), np.uint8)
        for place, alphabet in enumerate(self._alphabets):
            letters = np.frombuffer(alphabet.encode(), np.uint8)
            values[..., place] = letters[rng.integers(0, len(letters), values.shape[:2])]
        hay, places = self._hay(rng, number)
        asked = rng.integers(0, self._number, number)
        parts = [
            np.full((number, 1), ByteTokenizer.document_id, np.int32),
            np.tile(self._rendered("opening"), (number, 1)),
            _inserted(hay, _filled(self._rendered("needle"), names, values), places),
            _filled(self._rendered("question"), names[rows, asked]),
            values[rows, asked],
        ]
        text = np.concatenate(parts, axis=1)
        digits = np.array([len(alphabet) > 1 for alphabet in self._alphabets])
        targets = np.full((number, self.length), IGNORED, np.int32)
        targets[:, -len(digits) :] = np.where(digits, text[:, -len(digits) :], IGNORED)
        return Examples(text[:, :-1], targets)

    def to_dict(self) -> dict[str, Any]:
        """Its fields for a file of results, the documents as their size and SHA-256."""
        table = {field.name: getattr(self, field.name) for field in fields(self)}
        return table | {"documents": [len(self._text), hashlib.sha256(self._text).hexdigest()]}

    @property
    def _alphabets(self) -> list[str]:
        """The characters that may stand at each place of a value; where there is but one, nothing is asked."""
        return _UUID if self.uuids else ["123456789"] + ["0123456789"] * (self.digits - 1)

    @property
    def _number(self) -> int:
        return self.haystack_bytes // len(self._rendered("needle")) if self.haystack == "needles" else self.needles

    @property
    def _lines(self) -> int:
        return -(-self.haystack_bytes // len(_NOISE))

    def _rendered(self, name: str) -> np.ndarray:
        """[bytes] uint8: a template, with 0 in the place of each byte of a name and 1 in that of a value."""
        after = {"opening": "", "needle": " " if self.haystack == "text" else "\n", "question": " "}[name]
        fillings = {"kind": "uuid" if self.uuids else "number"}
        if name != "opening":
            fillings |= {"key": "\0" * _WORDS.shape[1], "value": "\1" * len(self._alphabets)}
        text = getattr(self, name).format(**fillings)
        return np.array([*(text + after).encode()], np.uint8)

    @cached_property
    def _text(self) -> bytes:
        return "\n".join(self.documents).encode()

    @cached_property
    def _sentences(self) -> np.ndarray:
        """Where the sentences of the text start."""
        return np.array([0, *(match.end() for match in re.finditer(rb"(?<=[.!?])\s+|\n\s*", self._text))])

    def _hay(self, rng: np.random.Generator, number: int) -> tuple[np.ndarray, np.ndarray]:
        """What needles are put into, [n, bytes], ending in a line break; and before which byte each of them goes, [n, m]."""
        size = self.haystack_bytes
        if self.haystack == "needles":
            return np.empty((number, 0), np.uint8), np.zeros((number, self._number), np.int64)
        if self.haystack == "noise":
            hay = np.tile(np.frombuffer((_NOISE * self._lines)[:size], np.uint8), (number, 1))
            places = len(_NOISE) * np.sort(distinct(rng, number, self._lines, self.needles), axis=1)
        else:
            sentences = self._sentences
            start = rng.choice(sentences[sentences + size <= len(self._text)], number)[:, None]
            hay = np.frombuffer(self._text, np.uint8)[start + np.arange(size)]
            depth = np.sort(distinct(rng, number, _DEPTHS, self.needles), axis=1) * (size - 1) // (_DEPTHS - 1)
            places = sentences[np.searchsorted(sentences, start + depth, side="right") - 1] - start
        hay[:, -1] = ord("\n")
        return hay, places


def _filled(template: np.ndarray, names: np.ndarray, values: np.ndarray | None = None) -> np.ndarray:
    """[..., bytes]: the template of `_rendered` with names [..., bytes of a name] and values [..., bytes of a value]."""
    filled = np.tile(template, (*names.shape[:-1], 1))
    for mark, text in enumerate((names, values)):
        if text is not None:
            here = np.flatnonzero(template == mark)
            filled[..., here] = np.tile(text, len(here) // text.shape[-1])
    return filled


def _inserted(hay: np.ndarray, needles: np.ndarray, places: np.ndarray) -> np.ndarray:
    """[n, bytes]: `hay` [n, h] with needles [n, m, l], each before the byte of `hay` that `places` [n, m], sorted, names."""
    number, count, size = needles.shape
    text = np.empty((number, hay.shape[1] + count * size), np.uint8)
    at = places[..., None] + size * np.arange(count)[:, None] + np.arange(size)
    rows = np.arange(number)[:, None, None]
    rest = np.ones(text.shape, bool)
    rest[rows, at] = False
    text[rows, at] = needles
    text[rest] = hay.ravel()
    return text
