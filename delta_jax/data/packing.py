"""Documents end to end in rows of one length, without losing a target, and resumable at any row."""

from __future__ import annotations

from typing import Any

import grain
import numpy as np

from delta_jax.data.records import DataError

Piece = np.ndarray | str
"""A document, int32 [2, tokens]: ids, and bytes of text each stands for, or [3, tokens] with 1 below what is learnt and 0
below what is only read; or in its place what kind of fault left it out, "" for one that is not of this stream."""


class PackRows(grain.IterDataset[dict[str, np.ndarray]]):
    """Cuts a stream of documents into rows of `length` (input, target) pairs.

    A document of n tokens (separators included) gives n - 1 pairs, each in exactly one row. A document that
    does not fit goes on in the next row, where it is a new segment: its first input there is the last target
    of the row before. Documents never share a segment, so no target is predicted from another document. The
    last row of a finite stream is padded with segment id 0 and mask 0. "bytes" are those that the targets stand for.

    grain's own `ConcatThenSplitIterDataset` does the same cut, but (0.2.18) its state compares tuples that
    JSON turns into lists, so that a stream restored from a checkpoint drops a document; its first-fit packing
    refuses documents longer than a row.

    Args:
        parent: yields pieces, documents of at least 2 tokens.
        length: pairs in a row.
        whole: each document, of at most length + 1 tokens, stands in one row; the rest of a row into which the next one does
            not fit is padded.
        skipped: kind of fault -> documents left out; kept up to what the rows so far have passed, and part of the
            iterator's state.
        patience: pieces without a document among them after which the stream is given up; None waits for ever.
    """

    def __init__(
        self,
        parent: grain.IterDataset[Piece],
        *,
        length: int,
        whole: bool = False,
        skipped: dict[str, int] | None = None,
        patience: int | None = None,
    ) -> None:
        super().__init__(parent)
        self._length, self._whole, self._skipped, self._patience = length, whole, skipped, patience

    def __iter__(self) -> grain.DatasetIterator[dict[str, np.ndarray]]:
        skipped = {} if self._skipped is None else self._skipped
        return _PackRowsIterator(
            self._parent.__iter__(), length=self._length, whole=self._whole, skipped=skipped, patience=self._patience
        )


class _PackRowsIterator(grain.DatasetIterator[dict[str, np.ndarray]]):
    """After a row at most one document is partly used: its place in the stream and an offset are state."""

    def __init__(
        self,
        parent: grain.DatasetIterator[Piece],
        *,
        length: int,
        whole: bool,
        skipped: dict[str, int],
        patience: int | None,
    ) -> None:
        super().__init__(parent)
        self._length, self._whole, self._skipped, self._patience = length, whole, skipped, patience
        self._document: np.ndarray | None = None
        self._before_document: dict[str, Any] = {}  # state of the parent that yields this document next
        self._offset = 0

    def __next__(self) -> dict[str, np.ndarray]:
        inputs, targets, segment_ids, sizes, learnt = np.zeros((5, self._length), np.int32)
        filled = segment = 0
        while filled < self._length:
            if self._document is None:
                try:
                    self._document, self._offset = self._next_document(), 0
                except StopIteration:
                    break
            if self._whole and self._document.shape[1] - 1 > self._length - filled:
                break
            segment += 1
            count = min(self._length - filled, self._document.shape[1] - 1 - self._offset)
            piece = self._document[:, self._offset : self._offset + count + 1]
            place = slice(filled, filled + count)
            inputs[place], targets[place], segment_ids[place] = piece[0, :-1], piece[0, 1:], segment
            sizes[place] = piece[1, 1:]
            learnt[place] = piece[2, 1:] if len(piece) > 2 else 1
            filled += count
            self._offset += count
            if self._offset == self._document.shape[1] - 1:
                self._document = None
        if filled == 0:
            raise StopIteration
        mask = learnt.astype(np.float32)
        return {"inputs": inputs, "targets": targets, "segment_ids": segment_ids, "mask": mask, "bytes": sizes}

    def _next_document(self) -> np.ndarray:
        waited = 0
        while True:
            self._before_document = self._parent.get_state()
            try:
                piece = next(self._parent)
            except DataError:
                self._parent.set_state(self._before_document)  # or the next call would pass over the document
                raise
            if not isinstance(piece, str):
                return piece
            if piece:
                self._skipped[piece] = self._skipped.get(piece, 0) + 1
            waited += 1
            if self._patience is not None and waited > self._patience:
                raise DataError(
                    f"data.path: the last {waited} documents held none that could be used; left out so far: "
                    f"{', '.join(f'{count} {kind}' for kind, count in self._skipped.items()) or 'none'}."
                )

    def get_state(self) -> dict[str, Any]:
        rest = {"skipped": dict(self._skipped)}
        if self._document is None:
            return {"parent": self._parent.get_state(), "offset": 0, **rest}
        return {"parent": self._before_document, "offset": self._offset, **rest}

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(state["parent"])
        self._before_document, self._offset = state["parent"], state["offset"]
        self._skipped.clear()
        self._skipped.update(state["skipped"])
        self._document = self._next_document() if self._offset else None
        if self._document is not None and self._offset >= self._document.shape[1] - 1:
            self._document = None  # it has become shorter than what was read of it
