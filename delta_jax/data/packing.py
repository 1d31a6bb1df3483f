"""Documents end to end in rows of one length, without losing a target, and resumable at any row."""

from __future__ import annotations

from typing import Any

import grain
import numpy as np


class PackRows(grain.IterDataset[dict[str, np.ndarray]]):
    """Cuts a stream of documents into rows of `length` (input, target) pairs.

    A document of n tokens (separators included) gives n - 1 pairs, each in exactly one row. A document that
    does not fit goes on in the next row, where it is a new segment: its first input there is the last target
    of the row before. Documents never share a segment, so no target is predicted from another document. The
    last row of a finite stream is padded with segment id 0 and mask 0.

    grain's own `ConcatThenSplitIterDataset` does the same cut, but (0.2.18) its state compares tuples that
    JSON turns into lists, so that a stream restored from a checkpoint drops a document; its first-fit packing
    refuses documents longer than a row.

    Args:
        parent: yields int32 arrays of at least 2 token ids.
        length: pairs in a row.
    """

    def __init__(self, parent: grain.IterDataset[np.ndarray], *, length: int) -> None:
        super().__init__(parent)
        self._length = length

    def __iter__(self) -> grain.DatasetIterator[dict[str, np.ndarray]]:
        return _PackRowsIterator(self._parent.__iter__(), length=self._length)


class _PackRowsIterator(grain.DatasetIterator[dict[str, np.ndarray]]):
    """After a row at most one document is partly used: its place in the stream and an offset are state."""

    def __init__(self, parent: grain.DatasetIterator[np.ndarray], *, length: int) -> None:
        super().__init__(parent)
        self._length = length
        self._document: np.ndarray | None = None
        self._before_document: dict[str, Any] = {}  # state of the parent that yields this document next
        self._offset = 0

    def __next__(self) -> dict[str, np.ndarray]:
        inputs, targets, segment_ids = np.zeros((3, self._length), np.int32)
        filled = segment = 0
        while filled < self._length:
            if self._document is None:
                self._before_document = self._parent.get_state()
                try:
                    self._document, self._offset = next(self._parent), 0
                except StopIteration:
                    break
            segment += 1
            count = min(self._length - filled, len(self._document) - 1 - self._offset)
            piece, place = (
                self._document[self._offset : self._offset + count + 1],
                slice(filled, filled + count),
            )
            inputs[place], targets[place], segment_ids[place] = piece[:-1], piece[1:], segment
            filled += count
            self._offset += count
            if self._offset == len(self._document) - 1:
                self._document = None
        if filled == 0:
            raise StopIteration
        mask = (segment_ids > 0).astype(np.float32)
        return {"inputs": inputs, "targets": targets, "segment_ids": segment_ids, "mask": mask}

    def get_state(self) -> dict[str, Any]:
        if self._document is None:
            return {"parent": self._parent.get_state(), "offset": 0}
        return {"parent": self._before_document, "offset": self._offset}

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(state["parent"])
        self._before_document, self._offset = state["parent"], state["offset"]
        self._document = next(self._parent) if self._offset else None
        if self._document is not None and self._offset >= len(self._document) - 1:
            self._document = None  # it has become shorter than what was read of it
