"""A document is on one side for ever, however its corpus grows, is ordered, is stored or lies."""

import json
import math

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from delta_jax.data import DataConfig, DataError, split, train_batches, validation_batches
from delta_jax.data.splitting import SplitCorpus, place_of


def write(file, texts):
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


def sides(path, **options):
    config = DataConfig(**{"path": str(path), "validation_fraction": 0.2, "seed": 5} | options)
    training, validation = ({part[index] for index in range(len(part))} for part in split(config))
    assert not training & validation
    return training, validation


def texts_of(count, start=0):
    return [f"the text of document {number}" for number in range(start, start + count)]


def test_nothing_moves_when_a_corpus_grows_or_is_ordered_and_stored_otherwise(tmp_path):
    old, new = texts_of(100), texts_of(60, 100)
    training, validation = sides(write(tmp_path / "a.jsonl", old))
    assert len(training) + len(validation) == 100
    mixed = np.random.default_rng(0).permutation([*old, *new, *old[:30]]).tolist()  # some come twice
    pyarrow.parquet.write_table(pyarrow.table({"text": mixed}), tmp_path / "b.parquet")
    (tmp_path / "files").mkdir()
    for number, text in enumerate(mixed):
        (tmp_path / "files" / f"{number}.txt").write_text(text)
    for path in (write(tmp_path / "c.jsonl", [*new, *old]), tmp_path / "b.parquet", tmp_path / "files"):
        more_training, more_validation = sides(path)
        assert training == more_training & set(old) and validation == more_validation & set(old)
        assert len(more_training) + len(more_validation) == 160


def test_the_share_is_the_one_asked_for_and_a_larger_one_only_adds(tmp_path):
    places = np.array([place_of(text, seed) for seed in range(3) for text in texts_of(4000)])
    for fraction in (0.01, 0.05, 0.5, 0.9):
        assert abs((places < fraction).mean() - fraction) < 4 * math.sqrt(fraction * (1 - fraction) / len(places))
    assert np.corrcoef(places.reshape(3, -1)).round(1).tolist() == np.eye(3).tolist()
    assert place_of("a", 0) == 0.14114785119166218  # of today and of every machine
    file = write(tmp_path / "a.jsonl", texts_of(100))
    small, large = (sides(file, validation_fraction=fraction)[1] for fraction in (0.1, 0.3))
    assert small < large and sides(file, seed=6)[1] != sides(file)[1]


def test_of_a_small_corpus_the_lowest_is_held_out_and_growth_leaks_nothing(tmp_path):
    trained = set()
    for count in range(2, 120, 3):
        file = write(tmp_path / "a.jsonl", texts_of(count))
        training, validation = sides(file, validation_fraction=0.05)
        below = {text for text in texts_of(count) if place_of(text, 5) < 0.05}
        assert validation == (below or {min(texts_of(count), key=lambda text: place_of(text, 5))})
        assert not trained & validation
        trained |= training
    assert below  # the corpus has outgrown the exception
    write(file, [*texts_of(3), *texts_of(3)])
    assert len(sides(file, validation_fraction=1e-9)[1]) == 1  # and its double with it
    config = DataConfig(path=str(file), validation_fraction=1e-9, shuffle_rows=1)
    held_out = split(config)[1][0].encode()
    batches = train_batches(config, batch_size=1, sequence_length=64)
    assert not any(held_out in bytes(next(batches)["targets"][0].astype(np.uint8)) for _ in range(9))


def test_nothing_to_train_on_is_one_sentence_that_says_what_would_do(tmp_path):
    file = write(tmp_path / "a.jsonl", texts_of(7))
    config = DataConfig(path=str(file), validation_fraction=0.9999)
    for make in (split, lambda config: train_batches(config, batch_size=1, sequence_length=8)):
        with pytest.raises(
            DataError, match=r"with 0\.9999 all 7 in .*a\.jsonl' are held out; wanted at most"
        ) as caught:
            make(config)
    wanted = float(str(caught.value).removesuffix(".").split()[-1])
    assert len(sides(file, validation_fraction=wanted, seed=0)[0]) == 1
    with pytest.raises(DataError, match=r"all 7 in .* are held out"):
        sides(file, validation_fraction=wanted + 1e-4, seed=0)
    write(file, ["the same"] * 7)
    with pytest.raises(DataError, match=r"all 7 in .* are held out; wanted documents that differ"):
        sides(file)


def test_a_process_without_documents_of_a_side(tmp_path):
    training, validation = sides(write(tmp_path / "a.jsonl", texts_of(10)), validation_fraction=0.5)
    file = write(
        tmp_path / "b.jsonl",
        [text for pair in zip(sorted(training)[:3], sorted(validation)[:3], strict=True) for text in pair],
    )
    config = DataConfig(path=str(file), validation_fraction=0.5, seed=5)
    train_batches(config, batch_size=1, sequence_length=8, process_index=0, process_count=2)
    with pytest.raises(DataError, match=r"a process reads \d documents of .*, none of them for training\.$"):
        train_batches(config, batch_size=1, sequence_length=8, process_index=1, process_count=2)


def test_a_side_is_found_once_and_no_more_is_read_than_is_needed(tmp_path, monkeypatch):
    file = write(tmp_path / "a.jsonl", texts_of(400))
    config = DataConfig(path=str(file), validation_fraction=0.2, seed=5)
    read = []
    corpus = SplitCorpus(config)
    whole = type(corpus._documents).__getitem__
    monkeypatch.setattr(type(corpus._documents), "__getitem__", lambda self, i: (read.append(i), whole(self, i))[1])
    first = next(SplitCorpus(config).texts("validation"))
    assert len(read) < 40
    held_out = list(corpus.texts("validation"))
    read.clear()
    assert list(SplitCorpus(config).texts("validation")) == held_out and held_out[0] == first
    assert len(read) == len(held_out) + 1  # and the document that is tried when a corpus is opened
    write(file, texts_of(401))
    assert len(list(SplitCorpus(config).texts("validation"))) >= len(held_out)
    assert len(read) > 400


def test_a_document_that_changes_sides_while_the_corpus_is_open_is_a_fault(tmp_path):
    training, validation = (sorted(side) for side in sides(write(tmp_path / "all.jsonl", texts_of(40))))
    for number, text in enumerate([*training[:5], validation[0]]):
        (tmp_path / f"{number}.txt").write_text(text)
    corpus = SplitCorpus(DataConfig(path=str(tmp_path / "*.txt"), validation_fraction=0.2, seed=5))
    assert dict(corpus.texts("training")) == dict(enumerate(training[:5]))
    (tmp_path / "3.txt").write_text(validation[1])
    with pytest.raises(DataError, match=r"3\.txt is no longer the document that it was"):
        list(corpus.texts("training"))
    (tmp_path / "3.txt").write_text(training[7])
    assert len(list(corpus.texts("training"))) == 5


def test_validation_batches_come_in_the_same_order_before_and_after_all_sides_are_known(tmp_path):
    config = DataConfig(path=str(write(tmp_path / "a.jsonl", texts_of(60))), validation_fraction=0.2)
    batches = validation_batches(config, batch_size=2, sequence_length=16)
    first = list(batches)
    split(config)
    np.testing.assert_equal(list(validation_batches(config, batch_size=2, sequence_length=16)), first)
    targets = np.concatenate([batch["targets"][batch["mask"] > 0] for batch in first])
    numbers = [
        int(bytes(part).split()[-1]) for part in np.split(targets.astype(np.uint8), np.flatnonzero(targets == 256))[:-1]
    ]
    assert sorted(numbers) != numbers  # not the order of the file, whose beginning may be unlike the rest
