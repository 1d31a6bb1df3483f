"""What tells two states of a corpus apart, and what does not."""

import importlib
import json
import os
import shutil

import pytest

from delta_jax.data import DataConfig, DataError, differences, fingerprint


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    (folder / "sub").mkdir(parents=True)
    for number in range(5):
        (folder / f"{number}.txt").write_text(f"text {number}" * 20)
    (folder / "sub" / "z.txt").write_text("the last")
    return folder


def of(path, **options):
    return fingerprint(DataConfig(path=str(path), **options))


def test_another_spelling_or_place_is_the_same(corpus, tmp_path, monkeypatch):
    first = of(corpus)
    assert json.loads(json.dumps(first)) == first
    assert (first["documents"], first["files"], first["bytes"], first["tokenizer"]) == (6, 6, 5 * 6 * 20 + 8, "bytes")
    monkeypatch.chdir(corpus.parent)
    (tmp_path / "link").symlink_to(corpus)
    shutil.copytree(corpus, tmp_path / "elsewhere" / "other name")
    os.utime(corpus / "0.txt", (1, 1))
    (corpus / "empty.txt").touch()  # no document
    spellings = [
        "corpus",
        "./corpus/",
        "corpus/../corpus",
        "corpus/**/*.txt",
        tmp_path / "link",
        "elsewhere/other name",
    ]
    for path in spellings:
        assert differences(first, of(path)) == [], path
    single = of(corpus / "0.txt")
    monkeypatch.chdir(corpus)
    assert differences(single, of("0.txt")) == [] and differences(single, of("./../corpus/0*")) == []
    assert fingerprint(DataConfig(path="0.txt", seed=3, validation_fraction=0.5, shuffle_rows=2)) == single


def test_what_changed_is_said(corpus):
    first = of(corpus)
    (corpus / "5.txt").write_text("more")
    assert differences(first, of(corpus)) == [
        "the corpus had 6 documents and has 7",
        "the corpus had 6 files and has 7",
        "the files of the corpus held 608 bytes and hold 612",
        "the files of the corpus have other names or another order than before",
        "the text of the corpus is not what it was",
    ]
    (corpus / "5.txt").unlink()
    assert differences(first, of(corpus)) == []
    (corpus / "3.txt").rename(corpus / "33.txt")
    assert differences(first, of(corpus)) == ["the files of the corpus have other names or another order than before"]
    (corpus / "33.txt").rename(corpus / "3.txt")
    (corpus / "4.txt").write_text("text 4" * 19 + "text 5")
    assert differences(first, of(corpus)) == ["the text of the corpus is not what it was"]
    (corpus / "4.txt").write_text("text 4" * 20 + "the ")
    (corpus / "sub" / "z.txt").write_text("last")
    assert differences(first, of(corpus)) == ["files of the corpus have other sizes than before"]


def test_a_corpus_that_grows_in_its_file(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "a"}\n' * 500)
    first = of(file)
    file.write_text('{"text": "a"}\n' * 520)
    assert differences(first, of(file))[0] == "the corpus had 500 documents and has 520"


def test_a_large_corpus_is_sampled_at_both_ends_and_between(tmp_path, monkeypatch):
    module = importlib.import_module("delta_jax.data.fingerprint")  # the package has a function of that name
    monkeypatch.setattr(module, "_WHOLE", 1000)
    monkeypatch.setattr(module, "_BLOCKS", 5)
    monkeypatch.setattr(module, "_BLOCK", 100)
    for name in "ab":
        (tmp_path / f"{name}.txt").write_bytes(name.encode() * 1000)
    first = of(tmp_path)
    seen = []
    for place in range(0, 2000, 25):
        file = tmp_path / ("a.txt" if place < 1000 else "b.txt")
        whole = bytearray(file.read_bytes())
        whole[place % 1000] = ord("!")
        kept = file.read_bytes()
        file.write_bytes(whole)
        seen.append(bool(differences(first, of(tmp_path))))
        file.write_bytes(kept)
    blocks = [0, 475, 950, 1425, 1900]
    assert seen == [any(start <= place < start + 100 for start in blocks) for place in range(0, 2000, 25)]


def test_the_tokenizer_is_its_file(corpus, tmp_path, write_tokenizer):
    path = write_tokenizer("some text", ["<|endoftext|>"])
    first = of(corpus, tokenizer=path)
    assert differences(of(corpus), first) == ["the tokenizer is another than before"]
    shutil.copy(path, tmp_path / "copy.json")
    assert differences(first, of(corpus, tokenizer=str(tmp_path / "copy.json"))) == []
    write_tokenizer("other text", ["<|endoftext|>"])
    assert differences(first, of(corpus, tokenizer=path)) == ["the tokenizer is another than before"]
    with pytest.raises(ValueError, match=r"data\.tokenizer: none\.json cannot be read: No such file"):
        of(corpus, tokenizer="none.json")


def test_a_fingerprint_of_less_is_not_the_same(corpus):
    first = of(corpus)
    rest = {key: value for key, value in first.items() if key not in ("bytes", "tokenizer")}
    said = [
        "one of the fingerprints says nothing of the corpus's bytes",
        "one of the fingerprints says nothing of the corpus's tokenizer",
    ]
    assert differences(rest, first) == differences(first, rest) == said
    with pytest.raises(DataError, match="no file, folder or glob match"):
        of(corpus / "nothing")
