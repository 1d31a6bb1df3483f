"""Rows hold every target exactly once, keep documents apart, and resume anywhere."""

import json

import grain
import numpy as np
import pytest

from delta_jax.data import DataError
from delta_jax.data.packing import PackRows

LENGTHS = [7, 2, 9, 2, 3, 40, 8, 8, 17, 2, 5]


def documents(lengths=LENGTHS):
    """Ids that count through all documents, and sizes that are another for each id."""
    ends = np.cumsum(lengths)
    ids = [np.arange(end - length, end, dtype=np.int32) for end, length in zip(ends, lengths, strict=True)]
    return [np.stack([one, 7 * one % 11]) for one in ids]


def rows_of(length, lengths=LENGTHS):
    return PackRows(grain.MapDataset.source(documents(lengths)).to_iter_dataset(), length=length)


@pytest.mark.parametrize("length", [2, 3, 8, 13, 200])
def test_every_target_exactly_once_and_in_order(length):
    rows = list(rows_of(length))
    used = [row["mask"] > 0 for row in rows]
    targets = np.concatenate([row["targets"][use] for row, use in zip(rows, used, strict=True)])
    inputs = np.concatenate([row["inputs"][use] for row, use in zip(rows, used, strict=True)])
    np.testing.assert_array_equal(targets, np.concatenate([document[0, 1:] for document in documents()]))
    np.testing.assert_array_equal(inputs, np.concatenate([document[0, :-1] for document in documents()]))
    assert all(use.all() for use in used[:-1])  # only the end of the last row is padding


@pytest.mark.parametrize("length", [2, 8, 13])
def test_segments_are_pieces_of_one_document(length):
    owner = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    for row in rows_of(length):
        segments = row["segment_ids"]
        used = segments > 0
        np.testing.assert_array_equal(used, row["mask"] == 1)
        np.testing.assert_array_equal(np.unique(segments[used]), np.arange(1, segments.max() + 1))
        assert not (row["inputs"][~used].any() or row["targets"][~used].any() or row["bytes"][~used].any())
        np.testing.assert_array_equal(row["bytes"][used], 7 * row["targets"][used] % 11)
        for segment in range(1, segments.max() + 1):
            inputs, targets = row["inputs"][segments == segment], row["targets"][segments == segment]
            assert len(set(owner[inputs]) | set(owner[targets])) == 1
            np.testing.assert_array_equal(inputs[1:], targets[:-1])


def test_types():
    row = next(iter(rows_of(8)))
    assert {name: (value.dtype.name, value.shape) for name, value in row.items()} == {
        "inputs": ("int32", (8,)),
        "targets": ("int32", (8,)),
        "segment_ids": ("int32", (8,)),
        "mask": ("float32", (8,)),
        "bytes": ("int32", (8,)),
    }


def test_resume_after_every_row_through_json():
    dataset = PackRows(grain.MapDataset.source(documents()).repeat().to_iter_dataset(), length=8)
    for taken in range(25):
        one, other = iter(dataset), iter(dataset)
        for _ in range(taken):
            next(one)
        other.set_state(json.loads(json.dumps(one.get_state())))
        assert other.get_state() == one.get_state()
        for _ in range(10):
            np.testing.assert_equal(next(other), next(one))


def test_the_end_of_a_finite_stream_stays_the_end():
    iterator = iter(rows_of(8))
    assert len(list(iterator)) == -(-sum(length - 1 for length in LENGTHS) // 8)
    other = iter(rows_of(8))
    other.set_state(iterator.get_state())
    with pytest.raises(StopIteration):
        next(other)


class Pieces(list):
    """A source whose pieces may be errors."""

    def __getitem__(self, index):
        piece = super().__getitem__(index)
        if isinstance(piece, Exception):
            raise piece
        return piece


def test_documents_left_out_are_counted_and_the_count_is_state():
    pieces = ["", *documents()[:3], "null", *documents()[3:6], "", "null", "not JSON", *documents()[6:], "null"]
    skipped = {}
    dataset = PackRows(grain.MapDataset.source(pieces).to_iter_dataset(), length=8, skipped=skipped)
    rows = list(dataset)
    np.testing.assert_equal(rows, list(rows_of(8)))
    assert skipped == {"null": 3, "not JSON": 1}
    for taken in range(len(rows)):
        skipped.clear()
        one = iter(dataset)
        for _ in range(taken):
            next(one)
        state, seen = json.loads(json.dumps(one.get_state())), dict(skipped)
        list(one)
        assert skipped == {"null": 3, "not JSON": 1}
        other = iter(dataset)
        other.set_state(state)
        assert skipped == seen == other.get_state()["skipped"]
        np.testing.assert_equal(list(other), rows[taken:])
        assert skipped == {"null": 3, "not JSON": 1}


def test_a_fault_is_raised_again_and_never_passed_over():
    pieces = Pieces([*documents()[:4], DataError("the fault"), *documents()[4:]])
    iterator = iter(PackRows(grain.MapDataset.source(pieces).to_iter_dataset(), length=8))
    next(iterator)
    for _ in range(3):
        with pytest.raises(DataError) as caught:
            list(iterator)
        assert str(caught.value) == "the fault"


def test_a_stream_without_documents_is_given_up():
    empty = grain.MapDataset.source(["", "null"]).repeat().to_iter_dataset()
    with pytest.raises(DataError, match=r"the last 5 documents held none .* left out so far: [23] null"):
        next(iter(PackRows(empty, length=8, patience=4)))
