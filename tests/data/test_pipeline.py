"""The stream of batches: split, order, exactness, exact resume."""

import dataclasses
import json
import re
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from delta_jax.data import (
    ByteTokenizer,
    DataConfig,
    DataError,
    load_documents,
    load_tokenizer,
    split,
    train_batches,
    validation_batches,
    validation_bytes,
)
from delta_jax.data.splitting import place_of


@pytest.fixture
def corpus(tmp_path):
    """31 documents of 1 to 400 bytes, all different."""
    generator = np.random.default_rng(7)
    lines = []
    for number in range(31):
        text = f"{number}:" + "".join(generator.choice(list("ab c\n\u00e9"), size=generator.integers(0, 300)))
        lines.append(json.dumps({"text": text}))
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines))
    return DataConfig(path=str(tmp_path / "corpus.jsonl"), validation_fraction=0.2, seed=3, shuffle_rows=16)


def texts(documents):
    return [documents[index] for index in range(len(documents))]


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def test_split_by_document_is_a_partition(corpus):
    training, validation = (texts(part) for part in split(corpus))
    assert len(validation) == 10 == sum(place_of(text, 3) < 0.2 for text in training + validation)
    assert sorted(training + validation) == sorted(texts(load_documents(corpus)))
    assert validation == texts(split(corpus)[1])
    other = DataConfig(path=corpus.path, validation_fraction=0.2, seed=4)
    assert sorted(validation) != sorted(texts(split(other)[1]))


def test_one_document_cannot_be_split(tmp_path):
    (tmp_path / "one.txt").write_text("only")
    with pytest.raises(ValueError, match=r"data\.path: .*one\.txt' has one document"):
        split(DataConfig(path=str(tmp_path / "one.txt")))


def test_validation_holds_every_target_once(corpus):
    tokenizer = ByteTokenizer()
    batches = validation_batches(corpus, batch_size=4, sequence_length=32)
    joined = {name: np.concatenate([batch[name].ravel() for batch in batches]) for name in ("targets", "mask")}
    wanted = [[*tokenizer.encode(text), 256] for text in texts(split(corpus)[1])]
    np.testing.assert_array_equal(joined["targets"][joined["mask"] > 0], np.concatenate(wanted))
    shapes = {batch["inputs"].shape for batch in batches}
    assert shapes == {(4, 32)}
    assert validation_bytes(corpus) == int(joined["mask"].sum()) - len(wanted)
    again = list(batches)
    np.testing.assert_equal(again, list(batches))


def test_a_tokenizer_json_covers_the_same_text(corpus, write_tokenizer):
    config = dataclasses.replace(corpus, tokenizer=write_tokenizer("0123456789: ab c\n\u00e9", ["<|endoftext|>"]))
    tokenizer = load_tokenizer(config.tokenizer)
    batches = list(validation_batches(config, batch_size=4, sequence_length=32))
    targets = np.concatenate([batch["targets"][batch["mask"] > 0] for batch in batches])
    ends = np.flatnonzero(targets == tokenizer.document_id)
    decoded = [tokenizer.decode(part) for part in np.split(targets, ends + 1)[:-1]]
    assert decoded == texts(split(config)[1])
    assert validation_bytes(config) == sum(len(text.encode()) for text in decoded)


def test_first_epoch_of_training_holds_every_target_once_and_the_next_is_in_another_order(corpus):
    config = DataConfig(path=corpus.path, validation_fraction=0.2, seed=3, shuffle_rows=1)
    documents = texts(split(config)[0])
    iterator = train_batches(config, batch_size=1, sequence_length=8)
    count = sum(len(text.encode()) + 1 for text in documents)
    stream = np.concatenate([batch["targets"][0] for batch in take(iterator, 2 * count // 8 + 1)])
    epochs = [bytes(np.where(part == 256, 0, part).astype(np.uint8)) for part in (stream[:count], stream[count:])]
    first, second = ([part.decode() for part in epoch.split(b"\0")[:-1]] for epoch in epochs)
    assert Counter(first) == Counter(documents)
    assert set(second) <= set(documents)
    assert first[: len(second)] != second


def test_no_epoch_of_training_holds_a_validation_document(corpus):
    documents = {text.encode() for text in texts(split(corpus)[0])}
    plain = DataConfig(path=corpus.path, validation_fraction=0.2, seed=3, shuffle_rows=1)
    batches = take(train_batches(plain, batch_size=8, sequence_length=256), 20)
    stream = np.concatenate([batch["targets"].ravel() for batch in batches])
    seen = bytes(np.where(stream == 256, 0, stream).astype(np.uint8)).split(b"\0")[:-1]
    assert len(seen) > 5 * len(documents)
    assert set(seen) == documents


def test_the_window_shuffles_rows_and_loses_none(corpus):
    plain = DataConfig(path=corpus.path, validation_fraction=0.2, seed=3, shuffle_rows=1)
    rows = [
        [batch["targets"][0].tobytes() for batch in take(train_batches(config, batch_size=1, sequence_length=16), 64)]
        for config in (plain, corpus)
    ]
    assert rows[0] != rows[1]
    for start in range(0, 64, 16):
        assert Counter(rows[0][start : start + 16]) == Counter(rows[1][start : start + 16])


def test_batches_are_complete(corpus):
    batch = next(train_batches(corpus, batch_size=3, sequence_length=16))
    assert {name: (value.dtype.name, value.shape) for name, value in batch.items()} == {
        "inputs": ("int32", (3, 16)),
        "targets": ("int32", (3, 16)),
        "segment_ids": ("int32", (3, 16)),
        "mask": ("float32", (3, 16)),
        "bytes": ("int32", (3, 16)),
    }
    assert batch["segment_ids"].min() == 1
    assert batch["mask"].min() == 1.0


def test_same_seed_same_stream_and_another_seed_another(corpus):
    def stream(config):
        return take(train_batches(config, batch_size=2, sequence_length=16), 40)

    np.testing.assert_equal(stream(corpus), stream(corpus))
    other = DataConfig(path=corpus.path, validation_fraction=0.2, seed=5, shuffle_rows=16)
    assert any((a["inputs"] != b["inputs"]).any() for a, b in zip(stream(corpus), stream(other), strict=True))


@pytest.mark.parametrize("taken", [0, 1, 7, 8, 50, 333])
def test_resume_mid_epoch_is_bit_for_bit(corpus, taken):
    iterator = train_batches(corpus, batch_size=2, sequence_length=16)
    take(iterator, taken)
    state = json.loads(json.dumps(iterator.get_state()))
    resumed = train_batches(corpus, batch_size=2, sequence_length=16)
    take(resumed, 3)  # a stream that has already run takes the state as well
    resumed.set_state(state)
    assert resumed.get_state() == state
    np.testing.assert_equal(take(resumed, 50), take(iterator, 50))


KILLED = """
import json, os, signal, sys
from delta_jax.data import DataConfig, train_batches
iterator = train_batches(DataConfig(**json.loads(sys.argv[1])), batch_size=2, sequence_length=16)
for _ in range(123):
    next(iterator)
print(json.dumps(iterator.get_state()), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_resume_after_kill_9(corpus):
    options = {name: getattr(corpus, name) for name in ("path", "validation_fraction", "seed", "shuffle_rows")}
    killed = subprocess.run([sys.executable, "-c", KILLED, json.dumps(options)], capture_output=True, text=True)
    assert killed.returncode == -9, killed.stderr
    resumed = train_batches(corpus, batch_size=2, sequence_length=16)
    resumed.set_state(json.loads(killed.stdout))
    whole = train_batches(corpus, batch_size=2, sequence_length=16)
    take(whole, 123)
    np.testing.assert_equal(take(resumed, 50), take(whole, 50))


def test_exit_with_a_live_iterator_is_silent():
    code = (
        "from delta_jax.data import DataConfig, train_batches\n"
        "iterator = train_batches(DataConfig(), batch_size=2, sequence_length=64)\n"
        "next(iterator)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_processes_share_the_documents(corpus):
    plain = DataConfig(path=corpus.path, validation_fraction=0.2, seed=3, shuffle_rows=1)
    seen = []
    for process in range(2):
        batches = train_batches(plain, batch_size=1, sequence_length=64, process_index=process, process_count=2)
        inputs = np.concatenate([batch["targets"][0] for batch in take(batches, 60)])
        documents = bytes(np.where(inputs == 256, 0, inputs).astype(np.uint8)).split(b"\0")[:-1]
        seen.append(set(documents))
    assert not seen[0] & seen[1]
    assert {text.encode() for text in texts(split(plain)[0])} == seen[0] | seen[1]


def test_a_broken_document_is_reported_from_inside_the_pipeline(tmp_path):
    lines = [f'{{"text": "{number}"}}' for number in range(60)] + ['{"body": "b"}']
    (tmp_path / "bad.jsonl").write_text("\n".join(lines))
    config = DataConfig(path=str(tmp_path / "bad.jsonl"), validation_fraction=0.5)
    batches = train_batches(config, batch_size=1, sequence_length=8)
    for _ in range(2):
        with pytest.raises(DataError) as caught:
            take(batches, 30)
        assert re.fullmatch(
            r"data\.text_field: \S+bad\.jsonl, line 61 has no field 'text'; it has body\.", str(caught.value)
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1; got 0"),
        ({"sequence_length": 1}, "sequence_length must be at least 2; got 1"),
        ({"process_index": 2, "process_count": 2}, "process_index 2 of process_count 2"),
        ({"process_count": 99}, r"documents \(31\)"),
    ],
)
def test_impossible_sizes(corpus, options, message):
    arguments = {"batch_size": 1, "sequence_length": 8} | options
    with pytest.raises(ValueError, match=message):
        train_batches(corpus, **arguments)
    if "process_count" not in options:
        with pytest.raises(ValueError, match=message):
            validation_batches(corpus, **arguments)
