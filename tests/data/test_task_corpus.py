"""Windows of a corpus as a task."""

from pathlib import Path

import numpy as np
import pytest

from delta_jax.config import to_dict
from delta_jax.data import ByteTokenizer, DataConfig
from delta_jax.data.tasks import Corpus, draw


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    """Documents of one letter each, so that a window says which document it is from."""
    for place in range(26):
        (tmp_path / f"{place:02d}.txt").write_text(chr(ord("a") + place) * 200)
    return Corpus(data=DataConfig(path=str(tmp_path), validation_fraction=0.25), length=16)


def test_targets_are_the_tokens_that_follow(corpus: Corpus) -> None:
    windows = draw(corpus, 100, split="train", seed=0)
    assert windows.inputs.shape == windows.targets.shape == (100, 16)
    np.testing.assert_array_equal(windows.inputs[:, 1:], windows.targets[:, :-1])


def test_splits_share_no_document(corpus: Corpus) -> None:
    train, test = (draw(corpus, 400, split=split, seed=0).inputs for split in ("train", "test"))
    edge = ByteTokenizer.document_id
    seen, unseen = set(train.flat) - {edge}, set(test.flat) - {edge}
    assert not seen & unseen
    assert len(unseen) == 4 and len(seen) == 22
    assert edge in train and edge in test


def test_a_seed_is_a_sample(corpus: Corpus) -> None:
    one, same, other = (draw(corpus, 50, split="train", seed=seed).inputs for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)


def test_the_table_tells_corpora_apart_and_holds_no_text(corpus: Corpus, tmp_path: Path) -> None:
    table = to_dict(corpus)
    assert table["train"]["tokens"] == 22 * 201 + 1 and table["test"]["tokens"] == 4 * 201 + 1
    assert len(str(table)) < 600
    other = tmp_path / "other"
    other.mkdir()
    for place in range(26):
        (other / f"{place:02d}.txt").write_text(chr(ord("a") + place) * 199 + "!")
    changed = to_dict(Corpus(data=DataConfig(path=str(other), validation_fraction=0.25), length=16))
    assert changed["train"]["tokens"] + changed["test"]["tokens"] == 26 * 201 + 2
    assert changed["train"]["sha256"] != table["train"]["sha256"]


def test_the_embedded_corpus_in_bytes() -> None:
    task = Corpus(length=64)
    text = bytes(draw(task, 1, split="test", seed=0).inputs[0].astype(np.uint8)).decode(errors="replace")
    assert task.vocab_size == 257 and text.isprintable() is False and " " in text


def test_impossible_windows_are_refused(corpus: Corpus) -> None:
    with pytest.raises(ValueError, match="length must be at least 1"):
        Corpus(length=0)
    with pytest.raises(ValueError, match="length must be less than"):
        draw(Corpus(data=corpus.data, length=5000), 1, split="test", seed=0)
