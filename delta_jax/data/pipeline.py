"""From a corpus to batches: split by document, tokenise, pack, shuffle, batch."""

from __future__ import annotations

import atexit
import functools
import warnings
import weakref
from collections import Counter
from typing import Any

import grain
import numpy as np

from delta_jax.config import convert
from delta_jax.data.config import DataConfig
from delta_jax.data.examples import Encoder, content, encode_text, encoder, require_text
from delta_jax.data.packing import PackRows, Piece
from delta_jax.data.records import DataError
from delta_jax.data.splitting import Side, SplitCorpus
from delta_jax.data.tokenizer import ByteTokenizer, load_tokenizer

Batch = dict[str, np.ndarray]

_READ = grain.ReadOptions(num_threads=4, prefetch_buffer_size=16)  # documents tokenised ahead
_SAMPLE = 1 << 18  # characters that are tokenised and turned back to see what is lost


def train_batches(
    config: DataConfig,
    *,
    batch_size: int,
    sequence_length: int,
    process_index: int = 0,
    process_count: int = 1,
) -> TrainBatches:
    """Batches of the training split, without end, in a new order of documents every epoch.

    Every document stands between two document ids; see `PackRows` for how documents become rows. The stream
    is a function of the arguments alone. `get_state()` is JSON-able and exact: an iterator made with the same
    arguments and given the state by `set_state` yields bit for bit what the first would have yielded next.

    Args:
        config: the corpus.
        batch_size: B, rows in a batch of this process.
        sequence_length: T, (input, target) pairs in a row.
        process_index: of this process; it reads every process_count-th document.
        process_count: processes that read the corpus together.

    Returns:
        An iterator over {"inputs": int32 [B, T], "targets": int32 [B, T], "segment_ids": int32 [B, T] from 1,
        "mask": float32 [B, T], 1 for targets to learn, which of text are all, "bytes": int32 [B, T], bytes of text that
        each of those stands for (`Tokenizer.encode_with_bytes`)}. Where `records` are no text, rows may end with padding,
        segment id 0 and mask 0. Its `skipped` are the documents left out so far.

    Raises:
        ValueError: an impossible size, a corpus or tokenizer that cannot be read, no document to train on. A fault of
            a document raises a `DataError` when the stream comes to it, and again at every further call.

    Examples:
        >>> import json
        >>> config = DataConfig(path=json.__path__[0] + "/*.py", shuffle_rows=8)
        >>> batches = train_batches(config, batch_size=2, sequence_length=16)
        >>> batch = next(batches)
        >>> bool((batch["inputs"][:, 1:] == batch["targets"][:, :-1]).all())
        True
        >>> batches.close()
    """
    _check_sizes(batch_size, sequence_length)
    encode = encoder(config, sequence_length)
    corpus = SplitCorpus(config)
    for name, number in (("process_index", process_index), ("process_count", process_count)):
        convert(int, number, name)
    if not 0 <= process_index < process_count <= len(corpus):
        raise ValueError(
            f"process_index {process_index} of process_count {process_count}: wanted 0 <= process_index < "
            f"process_count <= documents ({len(corpus)})."
        )
    mine = range(process_index, len(corpus), process_count)
    corpus.require("training", mine)
    _warn_of_lost_bytes(config)
    indices = grain.MapDataset.range(mine.start, mine.stop, mine.step)
    order = indices.shuffle(seed=(config.seed + 1) % 2**32).repeat()
    pieces = order.map_with_index(functools.partial(_piece, corpus, encode, "training", len(mine)))
    skipped: dict[str, int] = {}
    rows: grain.IterDataset[Batch] = PackRows(
        pieces.to_iter_dataset(_READ),
        length=sequence_length,
        whole=config.records != "text",
        skipped=skipped,
        patience=2 * len(mine),
    )
    if config.shuffle_rows > 1:
        rows = grain.experimental.WindowShuffleIterDataset(rows, window_size=config.shuffle_rows, seed=config.seed)
    iterator = TrainBatches(iter(rows.batch(batch_size, drop_remainder=True)), skipped)
    atexit.register(_close, weakref.ref(iterator))
    return iterator


def validation_batches(
    config: DataConfig, *, batch_size: int, sequence_length: int, part: Side = "validation"
) -> grain.IterDataset[Batch]:
    """Batches that hold every target of the validation split exactly once, in a fixed order.

    Args:
        config: the corpus.
        batch_size: B, rows in a batch.
        sequence_length: T, (input, target) pairs in a row. A document starts afresh in every row, so a longer
            row gives more context and a lower loss.
        part: "training" for the other split's documents in place of these, or "all", which may be one document.

    Returns:
        A finite iterable (each `iter` starts over) over batches as in `train_batches`; the end of the last
        batch is padded: segment id 0, mask 0. Bits per byte = sum of the targets' nats / (ln 2 * sum of "bytes").

    Raises:
        ValueError: as `train_batches`.

    Examples:
        >>> import json
        >>> config = DataConfig(path=json.__path__[0] + "/*.py")
        >>> batches = list(validation_batches(config, batch_size=2, sequence_length=512))
        >>> sum(int(batch["bytes"].sum()) for batch in batches) == validation_bytes(config)
        True
    """
    _check_sizes(batch_size, sequence_length)
    convert(Side, part, "part")
    encode = encoder(config, sequence_length)
    corpus = SplitCorpus(config, divided=part != "all")
    corpus.require(part)
    _warn_of_lost_bytes(config)
    pieces = grain.MapDataset.source(corpus.candidates(part)).map_with_index(
        functools.partial(_piece, corpus, encode, part, len(corpus))
    )
    pad = functools.partial(grain.experimental.batch_and_pad, batch_size=batch_size)
    rows = PackRows(pieces.to_iter_dataset(_READ), length=sequence_length, whole=config.records != "text")
    return rows.batch(batch_size, drop_remainder=False, batch_fn=pad)


def validation_bytes(config: DataConfig) -> int:
    """UTF-8 bytes of the validation documents: the sum of "bytes" over `validation_batches`.

    The document id that closes each document is among the targets and adds to the nats, and it stands for no byte
    but those at the end of the document that no token stands for.

    Raises:
        ValueError: as `train_batches`; or `records` are no text, of which it depends on the rows what is learnt.

    Examples:
        >>> import json
        >>> config = DataConfig(path=json.__path__[0] + "/*.py")
        >>> training, validation = split(config)
        >>> validation_bytes(config) == sum(len(text.encode()) for text in validation)
        True
    """
    require_text(config, "the bytes that are predicted depend on the length of rows")
    return sum(len(text.encode()) for _, text in SplitCorpus(config).texts("validation"))


def split(config: DataConfig) -> tuple[grain.MapDataset[str], grain.MapDataset[str]]:
    """The documents for training and for validation; reads the whole corpus once (see `SplitCorpus`).

    Returns:
        The training texts and the validation texts, as random-access datasets in a random order.

    Raises:
        ValueError: the corpus cannot be read, or there is no document on a side.

    Examples:
        >>> import json
        >>> training, validation = split(DataConfig(path=json.__path__[0] + "/*.py"))
        >>> set(training).isdisjoint(validation)
        True
    """
    corpus = SplitCorpus(config)
    corpus.require("training")
    corpus.require("validation")
    training, validation = (_Part(corpus, side) for side in ("training", "validation"))
    return grain.MapDataset.source(training), grain.MapDataset.source(validation)


class _Part:
    """The documents on a side.

    A source, not a slice of a shuffled dataset: grain shuffles that anew every epoch, so that from
    the second epoch on such a slice would hold validation documents.
    """

    def __init__(self, corpus: SplitCorpus, side: Side) -> None:
        self._corpus, self._side = corpus, side
        self._indices = [index for index, _ in corpus.texts(side)]

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> str:
        text = self._corpus.text(self._indices[index], self._side)
        assert text is not None
        return text


def _piece(corpus: SplitCorpus, encode: Encoder, side: Side, first_epoch: int, number: int, index: Any) -> Piece:
    """What a document is in a stream for one side; each that is left out is counted in the first epoch alone."""
    skip, again = corpus.config.on_error == "skip", number >= first_epoch
    if skip and again and corpus.is_bad(index):
        return ""
    try:
        text = corpus.text(int(index), side)
        piece = "" if text is None else encode(text, corpus.where(int(index)))
        return "" if again and isinstance(piece, str) else piece
    except DataError as error:
        if not skip:
            raise
        return "" if again else error.kind


@functools.lru_cache(maxsize=8)
def _warn_of_lost_bytes(config: DataConfig) -> None:
    """Warns if a sample of the documents, encoded and decoded, is not all there."""
    tokenizer = load_tokenizer(config.tokenizer)
    if isinstance(tokenizer, ByteTokenizer):
        return
    corpus, read, lost, characters = SplitCorpus(config), 0, 0, 0
    for index, whole in corpus.texts("training"):
        text = content(config, whole)[: _SAMPLE - characters]
        try:
            ids, _ = encode_text(tokenizer, text, corpus.where(index))
        except DataError:
            if config.on_error == "stop":
                raise
            continue
        gone = Counter(text) - Counter(tokenizer.decode(ids))
        lost += sum(count * len(character.encode()) for character, count in gone.items())
        read, characters = read + len(text.encode()), characters + len(text)
        if characters >= _SAMPLE:
            break
    if lost:
        warnings.warn(
            f"data.tokenizer: {config.tokenizer} loses {lost / read:.2%} of the bytes of the corpus at {config.path!r} "
            f"({lost:,} of {read:,} in a sample do not come back when it is decoded); bits per byte count all bytes, and "
            "what is lost is never predicted.",
            stacklevel=3,
        )


class TrainBatches(grain.experimental.ThreadPrefetchDatasetIterator):
    """Batches made ahead in a thread; closing again does nothing, as at exit its modules may be gone.

    Attributes:
        skipped: kind of fault -> documents left out so far, each counted once; part of the state.

    Examples:
        >>> import json
        >>> config = DataConfig(path=json.__path__[0] + "/*.py", shuffle_rows=8)
        >>> batches = train_batches(config, batch_size=2, sequence_length=16)
        >>> isinstance(batches, TrainBatches), next(batches)["inputs"].shape
        (True, (2, 16))
        >>> batches.close()
    """

    def __init__(self, batches: grain.DatasetIterator[Batch], skipped: dict[str, int]) -> None:
        super().__init__(batches, prefetch_buffer_size=4)
        self._skipped = skipped
        self._error: DataError | None = None

    @property
    def skipped(self) -> dict[str, int]:
        return dict(self._skipped)

    def __next__(self) -> Batch:
        if self._error is not None:
            raise self._error
        try:
            batch: Batch = super().__next__()
        except DataError as error:
            self._error = error  # grain would go on behind the document
            raise
        return batch

    def set_state(self, state: Any) -> None:
        self._error = None
        super().set_state(state)

    def close(self) -> None:
        if not self._closed:
            super().close()


def _close(iterator: weakref.ref[TrainBatches]) -> None:
    if (alive := iterator()) is not None:
        alive.close()


def _check_sizes(batch_size: int, sequence_length: int) -> None:
    for name, size, least in (("batch_size", batch_size, 1), ("sequence_length", sequence_length, 2)):
        if convert(int, size, name) < least:
            raise ValueError(f"{name} must be at least {least}; got {size}.")
