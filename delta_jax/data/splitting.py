"""Which documents are for training and which for validation: a hash of each decides, once and for all."""

from __future__ import annotations

import functools
import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Int

from delta_jax.data.config import DataConfig
from delta_jax.data.records import DataError
from delta_jax.data.sources import load_documents

Side = Literal["training", "validation"]

_UNKNOWN, _EMPTY, _BAD = 0, 3, 4
_CODES: dict[Side, int] = {"training": 1, "validation": 2}


def place_of(text: str, seed: int) -> float:
    """The place of a document in [0, 1): those below `validation_fraction` are held out.

    Uniform for different texts, and a function of text and seed alone.
    """
    digest = hashlib.blake2b(text.encode(), digest_size=8, key=seed.to_bytes(4, "big")).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2.0**53


class SplitCorpus:
    """The documents of a corpus on their sides.

    A document is read when its side is first asked for, and its side is remembered as long as the files are
    unchanged: a stream reads no more of the corpus than it needs, and no evaluation but the first reads what is for
    training.

    Args:
        config: the corpus.

    Raises:
        DataError: as `load_documents`, or there is one document alone.
    """

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        self._documents = load_documents(config)
        if len(self) < 2:
            raise DataError(
                f"data.path: the corpus at {config.path!r} has one document; the split into "
                "training and validation takes two."
            )
        stamps = tuple(_stamp(file) for file in self._documents.files)
        what = (type(self._documents).__name__, config.text_field, config.seed, config.validation_fraction)
        self._sides = _sides(stamps, what, len(self))

    def __len__(self) -> int:
        return len(self._documents)

    def text(self, index: int, side: Side) -> str | None:
        """The document; None where it is on the other side, or empty.

        Raises:
            DataError: it cannot be read; also where bad documents are skipped.
        """
        code, known = _CODES[side], self._sides[index]
        if known not in (_UNKNOWN, _BAD, code):
            return None
        try:
            text = self._documents[index]
        except DataError:
            self._sides[index] = _BAD
            raise
        if known != code:
            held_out = place_of(text, self.config.seed) < self.config.validation_fraction
            self._sides[index] = known = _CODES["validation" if held_out else "training"] if text else _EMPTY
        return text if known == code else None

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
        possible = np.isin(self._sides, (_UNKNOWN, _CODES[side], *([_BAD] if self.config.on_error == "stop" else [])))
        order = np.random.default_rng(self.config.seed).permutation(len(self))
        return order[possible[order]]

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
        config, of = self.config, f"the corpus at {self.config.path!r}"
        indices = range(len(self)) if indices is None else indices
        other: Side = "validation" if side == "training" else "training"
        places = [place_of(text, config.seed) for _, text in self.texts(other, indices)]
        if not places:
            raise DataError(f"data.path: {of} holds no document with text{self._why(indices)}.")
        if len(indices) < len(self):
            raise DataError(f"data.path: a process reads {len(indices)} documents of {of}, none of them for {side}.")
        if side == "validation":
            least = (math.floor(min(places) * 1e4) + 1) / 1e4
            wanted = f"at least {least}" if least < 1 else "more documents"
        else:
            most = math.floor(max(places) * 1e4) / 1e4
            wanted = f"at most {most}" if most > 0 else "more documents"
        raise DataError(
            f"data.validation_fraction: a hash of its text puts each document on a side, and with "
            f"{config.validation_fraction} none of the {len(places)} in {of} is for {side}; wanted {wanted}."
        )

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


@functools.lru_cache(maxsize=8)
def _sides(stamps: tuple[tuple[str, int, int], ...], what: tuple[object, ...], count: int) -> np.ndarray:
    """What is known of the sides of a corpus's documents; it is filled in as they are read."""
    return np.zeros(count, np.uint8)
