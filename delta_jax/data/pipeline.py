"""From a corpus to batches: split by document, tokenise, pack, shuffle, batch."""

from __future__ import annotations

import atexit
import functools
import weakref

import grain
import numpy as np

from delta_jax.data.config import DataConfig
from delta_jax.data.packing import PackRows
from delta_jax.data.sources import Documents, load_documents
from delta_jax.data.tokenizer import Tokenizer, load_tokenizer

Batch = dict[str, np.ndarray]

_READ = grain.ReadOptions(num_threads=4, prefetch_buffer_size=16)  # documents tokenised ahead


def train_batches(
    config: DataConfig,
    *,
    batch_size: int,
    sequence_length: int,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator[Batch]:
    """Batches of the training split, without end, in a new order of documents every epoch.

    Every document stands between two document ids; see `PackRows` for how documents become rows. The stream
    is a function of the arguments alone. `get_state()` is JSON-able and exact: an iterator made with the same
    arguments and given the state by `set_state` yields bit for bit what the first would have yielded next.

    Args:
        config: the corpus.
        batch_size: B, rows in a batch of this process.
        sequence_length: T, (input, target) pairs in a row.
        process_index: of this process; it reads every process_count-th training document.
        process_count: processes that read the corpus together.

    Returns:
        An iterator over {"inputs": int32 [B, T], "targets": int32 [B, T], "segment_ids": int32 [B, T] from 1,
        "mask": float32 [B, T], all 1 here}.

    Raises:
        ValueError: an impossible size, a corpus or tokenizer that cannot be read, fewer than two documents.
    """
    _check_sizes(batch_size, sequence_length)
    tokenizer = load_tokenizer(config.tokenizer)
    training, _ = split(config)
    if not 0 <= process_index < process_count <= len(training):
        raise ValueError(
            f"process_index {process_index} of process_count {process_count}: wanted 0 <= process_index < "
            f"process_count <= training documents ({len(training)})."
        )
    training = training[process_index::process_count]
    documents = training.shuffle(seed=(config.seed + 1) % 2**32).repeat().map(functools.partial(_tokenise, tokenizer))
    rows: grain.IterDataset[Batch] = PackRows(documents.to_iter_dataset(_READ), length=sequence_length)
    if config.shuffle_rows > 1:
        rows = grain.experimental.WindowShuffleIterDataset(rows, window_size=config.shuffle_rows, seed=config.seed)
    batches = rows.batch(batch_size, drop_remainder=True)
    iterator = _Prefetch(iter(batches), prefetch_buffer_size=4)
    atexit.register(_close, weakref.ref(iterator))
    return iterator


def validation_batches(config: DataConfig, *, batch_size: int, sequence_length: int) -> grain.IterDataset[Batch]:
    """Batches that hold every target of the validation split exactly once, in a fixed order.

    Args:
        config: the corpus.
        batch_size: B, rows in a batch.
        sequence_length: T, (input, target) pairs in a row. A document starts afresh in every row, so a longer
            row gives more context and a lower loss.

    Returns:
        A finite iterable (each `iter` starts over) over batches as in `train_batches`; the end of the last
        batch is padded: segment id 0, mask 0.

    Raises:
        ValueError: as `train_batches`.
    """
    _check_sizes(batch_size, sequence_length)
    tokenizer = load_tokenizer(config.tokenizer)
    _, validation = split(config)
    documents = validation.map(functools.partial(_tokenise, tokenizer)).to_iter_dataset(_READ)
    pad = functools.partial(grain.experimental.batch_and_pad, batch_size=batch_size)
    return PackRows(documents, length=sequence_length).batch(batch_size, drop_remainder=False, batch_fn=pad)


def validation_bytes(config: DataConfig) -> int:
    """UTF-8 bytes of the validation documents: what the targets of `validation_batches` stand for.

    Bits per byte = sum of the targets' nats / (ln 2 * validation_bytes). The document id that closes each
    document is among the targets and adds to the nats, and it stands for no byte.
    """
    _, validation = split(config)
    return sum(len(validation[index].encode()) for index in range(len(validation)))


def split(config: DataConfig) -> tuple[grain.MapDataset[str], grain.MapDataset[str]]:
    """The documents for training and for validation, by a seeded permutation of the document index.

    Returns:
        The training texts and the validation texts, as random-access datasets.

    Raises:
        ValueError: the corpus cannot be read, or it has fewer than two documents.
    """
    documents = load_documents(config)
    count = len(documents)
    if count < 2:
        raise ValueError(
            f"data.path: the corpus at {config.path!r} has one document; the split into "
            "training and validation takes two."
        )
    held_out = min(max(round(config.validation_fraction * count), 1), count - 1)
    validation = _Part(documents, config.seed, range(held_out))
    training = _Part(documents, config.seed, range(held_out, count))
    return grain.MapDataset.source(training), grain.MapDataset.source(validation)


class _Part:
    """Documents at some places of a seeded permutation.

    A source, not a slice of a shuffled dataset: grain shuffles that anew every epoch, so that from
    the second epoch on such a slice would hold validation documents.
    """

    def __init__(self, documents: Documents, seed: int, places: range) -> None:
        self._documents, self._seed, self._places = documents, seed, places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> str:
        last = len(self._documents) - 1
        return self._documents[
            grain.experimental.index_shuffle(self._places[index], max_index=last, seed=self._seed, rounds=4)
        ]


def _tokenise(tokenizer: Tokenizer, text: str) -> np.ndarray:
    edge = np.array([tokenizer.document_id], np.int32)
    return np.concatenate([edge, tokenizer.encode(text), edge])


class _Prefetch(grain.experimental.ThreadPrefetchDatasetIterator):
    """Batches made ahead in a thread; closing again does nothing, as at exit its modules may be gone."""

    skipped: dict[str, int] = {}  # noqa: RUF012

    def close(self) -> None:
        if not self._closed:
            super().close()


def _close(iterator: weakref.ref[_Prefetch]) -> None:
    if (alive := iterator()) is not None:
        alive.close()


def _check_sizes(batch_size: int, sequence_length: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1; got {batch_size}.")
    if sequence_length < 2:
        raise ValueError(f"sequence_length must be at least 2; got {sequence_length}.")
