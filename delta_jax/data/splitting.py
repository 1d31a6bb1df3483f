"""Which documents are for training and which for validation: a hash of each decides, once and for all."""

from __future__ import annotations

import functools
import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Int

from delta_jax.data.config import DataConfig
from delta_jax.data.records import DataError
from delta_jax.data.sources import load_documents

Side = Literal["training", "validation", "all"]

_UNKNOWN, _EMPTY, _BAD = 0, 3, 4
_CODES: dict[str, int] = {"training": 1, "validation": 2}


def place_of(text: str, seed: int) -> float:
    """The place of a document in [0, 1): those below `validation_fraction` are held out, and the lowest in any case.

    Uniform for different texts, and a function of text and seed alone.
    """
    digest = hashlib.blake2b(text.encode(), digest_size=8, key=seed.to_bytes(4, "big")).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2.0**53


class SplitCorpus:
    """The documents of a corpus on their sides.

    A document is read when its side is first asked for, and its side is remembered as long as the files are
    unchanged: a stream reads no more of the corpus than it needs, and no evaluation but the first reads what is for
    training. A document that changes sides while the corpus is open is a fault.

    Args:
        config: the corpus.
        divided: whether the sides are what is asked for, which takes two documents.

    Raises:
        DataError: as `load_documents`, or there is one document alone to be divided.
    """

    def __init__(self, config: DataConfig, *, divided: bool = True) -> None:
        self.config = config
        self._documents = load_documents(config)
        if divided and len(self) < 2:
            raise DataError(
                f"data.path: the corpus at {config.path!r} has one document; the split into "
                "training and validation takes two."
            )
        stamps = tuple(_stamp(file) for file in self._documents.files)
        what = (
            type(self._documents).__name__,
            config.records,
            config.text_field,
            config.seed,
            config.validation_fraction,
        )
        self._known = _known(stamps, what, len(self))
        self._sides = self._known.sides
        if self._known.share is None:
            self._known.share = self._find_share()

    def __len__(self) -> int:
        return len(self._documents)

    def text(self, index: int, side: Side) -> str | None:
        """The document; None where it is on the other side, or empty.

        Raises:
            DataError: it cannot be read; also where bad documents are skipped.
        """
        codes = self._codes(side)
        if self._sides[index] not in (_UNKNOWN, _BAD, *codes):
            return None
        text = self._read(index)
        return text if self._sides[index] in codes else None

    def _codes(self, side: Side) -> tuple[int, ...]:
        return tuple(_CODES.values()) if side == "all" else (_CODES[side],)

    def _read(self, index: int) -> str:
        """The document, whose side is known from then on."""
        try:
            text = self._documents[index]
        except DataError:
            self._sides[index] = _BAD
            raise
        held_out = place_of(text, self.config.seed) < (self._known.share or self.config.validation_fraction)
        code = _CODES["validation" if held_out else "training"] if text else _EMPTY
        if self._sides[index] not in (_UNKNOWN, _BAD, code):
            raise DataError(f"data.path: {self.where(index)} is no longer the document that it was.", "changed")
        self._sides[index] = code
        return text

    def where(self, index: int) -> str:
        """The document's file and its line, row or record there."""
        return self._documents.where(index)

    def is_bad(self, index: int) -> bool:
        """Whether the document is known to be one that cannot be read."""
        return bool(self._sides[index] == _BAD)

    def candidates(self, side: Side) -> Int[np.ndarray, " documents"]:
        """The documents that may be on a side, in a random order that the seed and their number decide.

        What is known by now to be elsewhere is left out, and so are bad documents where they are skipped.
        """
        possible = np.isin(
            self._sides, (_UNKNOWN, *self._codes(side), *([_BAD] if self.config.on_error == "stop" else []))
        )
        order = self._order()
        return order[possible[order]]

    def _order(self) -> Int[np.ndarray, " documents"]:
        return np.random.default_rng(self.config.seed).permutation(len(self))

    def texts(self, side: Side, indices: Iterable[int] | None = None) -> Iterator[tuple[int, str]]:
        """Number and text of the documents on a side, in the order of the indices, default that of `candidates`."""
        for index in self.candidates(side) if indices is None else indices:
            try:
                text = self.text(int(index), side)
            except DataError:
                if self.config.on_error == "stop":
                    raise
                continue
            if text is not None:
                yield int(index), text

    def require(self, side: Side, indices: Sequence[int] | None = None) -> None:
        """Raises a DataError if there is no document on a side (among the indices)."""
        if next(self.texts(side, indices), None) is not None:
            return
        of = f"the corpus at {self.config.path!r}"
        indices = range(len(self)) if indices is None else indices
        other: Side = "validation" if side == "training" else "training"
        places = [place_of(text, self.config.seed) for _, text in self.texts(other, indices)]
        if not places:
            raise DataError(f"data.path: {of} holds no document with text{self._why(indices)}.")
        if len(indices) < len(self):
            raise DataError(f"data.path: a process reads {len(indices)} documents of {of}, none of them for {side}.")
        most = math.floor(max(places) * 1e4) / 1e4
        wanted = f"at most {most}" if min(places) < most else "documents that differ"
        raise DataError(
            f"data.validation_fraction: a hash of its text puts each document on a side, and with "
            f"{self.config.validation_fraction} all {len(places)} in {of} are held out; wanted {wanted}."
        )

    def _find_share(self) -> float:
        """Below which place documents are held out: the fraction, but where that holds out none the least that does.

        What was trained on is still never held out when the corpus grows: all that is added can only lower the lowest.
        """
        fraction, lowest = self.config.validation_fraction, 1.0
        where: list[int] = []
        for index in self._order():
            try:
                text = self._read(int(index))
            except DataError:
                if self.config.on_error == "stop":
                    raise
                continue
            if not text:
                continue
            place = place_of(text, self.config.seed)
            if place < fraction:
                return fraction
            if place <= lowest:
                where = [*(where if place == lowest else []), int(index)]
                lowest = place
        self._sides[where] = _CODES["validation"]
        return math.nextafter(lowest, 1.0)

    def _why(self, indices: Iterable[int]) -> str:
        kinds: Counter[str] = Counter()
        first = ""
        for index in indices:
            try:
                self._documents[int(index)]
            except DataError as error:
                kinds[error.kind] += 1
                first = first or str(error).rstrip(".")
        counted = ", ".join(f"{number} {kind}" for kind, number in kinds.items())
        return f" (left out: {counted}; the first: {first})" if kinds else ""


def _stamp(file: Path) -> tuple[str, int, int]:
    """Tells whether a file is still the same."""
    try:
        stat = file.stat()
    except OSError:
        return str(file), 0, 0
    return str(file), stat.st_mtime_ns, stat.st_size


@dataclass
class _Known:
    """What is known of a corpus: the sides of the documents that were read, and below which place they are held out."""

    sides: np.ndarray
    share: float | None = None


@functools.lru_cache(maxsize=8)
def _known(stamps: tuple[tuple[str, int, int], ...], what: tuple[object, ...], count: int) -> _Known:
    """It is filled in as documents are read."""
    return _Known(np.zeros(count, np.uint8))
