"""Bytes and tokenizer.json files turn text into ids and back."""

import numpy as np
import pytest

from delta_jax.data import ByteTokenizer, load_tokenizer

TEXT = "def f(x):\n    return x  # na\u00efve \u2014 \U0001f600\n"


def test_bytes_round_trip():
    tokenizer = load_tokenizer("bytes")
    ids = tokenizer.encode(TEXT)
    assert ids.dtype == np.int32
    assert ids.tolist() == list(TEXT.encode())
    assert tokenizer.decode(ids) == TEXT
    assert (tokenizer.vocab_size, tokenizer.document_id) == (257, 256)


def test_any_bytes_round_trip_and_only_the_display_replaces():
    tokenizer = ByteTokenizer()
    data = bytes(range(256))
    ids = tokenizer.encode(data)
    assert tokenizer.decode_bytes(ids) == data
    assert tokenizer.decode_bytes([256, 65, 300, 66, 256]) == b"AB"
    assert tokenizer.decode([0xC3, 65]) == "\ufffdA"


def test_json_tokenizer(write_tokenizer):
    tokenizer = load_tokenizer(write_tokenizer(TEXT, ["<pad>", "</s>", "<|endoftext|>"]))
    ids = tokenizer.encode(TEXT)
    assert ids.dtype == np.int32
    assert len(ids) < len(TEXT.encode())
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.document_id == 2  # <|endoftext|> comes before </s> in the rule
    assert tokenizer.decode([2, *ids, 2]) == TEXT
    assert ids.max() < tokenizer.vocab_size <= 300


def test_json_tokenizer_without_a_document_token(write_tokenizer):
    file = write_tokenizer(TEXT, ["<pad>"])
    with pytest.raises(ValueError, match=r"data\.tokenizer: .* no special token to separate documents.*it has <pad>"):
        load_tokenizer(file)


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(ValueError, match=r"data\.tokenizer: no such file: 'byte'"):
        load_tokenizer("byte")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"data\.tokenizer: .* is not a tokenizer\.json"):
        load_tokenizer(str(tmp_path / "tokenizer.json"))
