"""Bytes and tokenizer.json files turn text into ids and back."""

import re

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

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


SPECIAL = ["<|endoftext|>", "</s>", "<s>", "[SEP]", "<unk>"]
HOSTILE = "a <|endoftext|> b</s> <s> [SEP][SEP] <unk> <|endoftext|>"


def kinds():
    """Name -> a tokenizer that has been trained with special tokens in its vocabulary, and whether it returns all text."""
    letters = pre_tokenizers.ByteLevel.alphabet()
    options = {"special_tokens": SPECIAL, "show_progress": False}
    split = pre_tokenizers.WhitespaceSplit()
    byte_level = Tokenizer(models.BPE())
    byte_level.pre_tokenizer, byte_level.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    yield "byte level", byte_level, trainers.BpeTrainer(vocab_size=300, initial_alphabet=letters, **options), True
    whole_words = Tokenizer(models.BPE(ignore_merges=True))
    whole_words.pre_tokenizer = split
    yield "BPE of whole words", whole_words, trainers.BpeTrainer(vocab_size=120, **options), False
    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = split
    yield "words", words, trainers.WordLevelTrainer(**options), False
    pieces = Tokenizer(models.WordPiece(unk_token="<unk>"))
    pieces.pre_tokenizer, pieces.decoder = split, decoders.WordPiece()
    yield "WordPiece", pieces, trainers.WordPieceTrainer(vocab_size=200, **options), False
    unigram = Tokenizer(models.Unigram())
    unigram.pre_tokenizer, unigram.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    yield "Unigram", unigram, trainers.UnigramTrainer(vocab_size=80, unk_token="<unk>", **options), True


@pytest.mark.parametrize("kind", list(kinds()), ids=lambda kind: kind[0])
def test_text_that_reads_like_a_special_token_is_text(tmp_path, kind):
    _, made, trainer, whole = kind
    letters = " ".join("<|>/[]abcdefghijklmnopqrstuvwxyzSEP")
    made.train_from_iterator([f"{HOSTILE} {letters} {letters.replace(' ', '')}"] * 3, trainer)
    made.enable_truncation(4)
    made.enable_padding(length=64)
    made.save(str(tmp_path / "tokenizer.json"))
    marked = b"\xef\xbb\xbf" + (tmp_path / "tokenizer.json").read_bytes()
    (tmp_path / "tokenizer.json").write_bytes(marked)
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert tokenizer.document_id == made.token_to_id("<|endoftext|>") and tokenizer.vocab_size == 1 + max(
        made.get_vocab().values()
    )
    ids = tokenizer.encode(HOSTILE)
    never = {made.token_to_id(token) for token in SPECIAL} - {made.token_to_id("<unk>")}
    assert not never & set(ids.tolist())
    if whole:
        assert tokenizer.decode([tokenizer.document_id, *ids, tokenizer.document_id]) == HOSTILE
    long = "ab " * 100
    ids, sizes = tokenizer.encode_with_bytes(long)
    assert len(ids) >= 100 and sizes.sum() in (300, 299)  # the last space is no token's but for some
    np.testing.assert_array_equal(ids, tokenizer.encode(long))

    # Where a template has written them they are special, as for the library itself, unless what they stand in is shielded.
    made.no_truncation()
    made.no_padding()
    wanted = made.encode(HOSTILE, add_special_tokens=False)
    ids, sizes, starts = tokenizer.encode_special(HOSTILE)
    assert (ids.tolist(), starts.tolist()) == (wanted.ids, [start for start, _ in wanted.offsets])
    assert never <= set(ids.tolist())
    assert sizes.sum() == len(re.sub("|".join(map(re.escape, SPECIAL)), "", HOSTILE).encode())
    ids, sizes, _ = tokenizer.encode_special(tokenizer.shield(HOSTILE))
    for one, other in zip((ids, sizes), tokenizer.encode_with_bytes(HOSTILE), strict=True):
        np.testing.assert_array_equal(one, other)


def test_bytes_of_tokens_by_the_rule(tmp_path, write_tokenizer):
    tokenizer = load_tokenizer(write_tokenizer("aa", ["</s>"]))  # all else is single bytes
    ids, sizes = tokenizer.encode_with_bytes("\u00e9\u65e5a\U0001f600")
    assert len(ids) == 2 + 3 + 1 + 4
    assert sizes.tolist() == [2, 0, 3, 0, 0, 1, 4, 0, 0, 0]  # a character is its first token's
    ids, sizes = ByteTokenizer().encode_with_bytes("\u00e9a")
    assert sizes.tolist() == [1, 1, 1]
    plain = Tokenizer(models.BPE({"</s>": 0, "a": 1, "b": 2}, []))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    plain.add_special_tokens(["</s>"])
    plain.save(str(tmp_path / "plain.json"))
    tokenizer = load_tokenizer(str(tmp_path / "plain.json"))
    ids, sizes = tokenizer.encode_with_bytes("\u65e5 a \u65e5\u65e5 b \u00e9")
    assert (ids.tolist(), sizes.tolist()) == ([1, 2], [5, 9])  # and the last three are the closing document id's
    assert [part.tolist() for part in tokenizer.encode_with_bytes("\u65e5")] == [[], []]
    plain.normalizer = normalizers.NFKC()
    plain.save(str(tmp_path / "plain.json"))
    assert load_tokenizer(str(tmp_path / "plain.json")).encode_with_bytes("\uff41b")[1].tolist() == [3, 1]


@pytest.mark.parametrize("name", ["bytes", "json"])
def test_half_a_surrogate_pair_is_no_text(write_tokenizer, name):
    tokenizer = load_tokenizer("bytes" if name == "bytes" else write_tokenizer(TEXT, ["</s>"]))
    for encode in (tokenizer.encode, tokenizer.encode_with_bytes):
        with pytest.raises(ValueError, match=r"^text: character 2 is U\+D83D, half of a surrogate pair"):
            encode("ab\ud83d")


def test_unknown_text_never_ends_a_document(tmp_path):
    made = Tokenizer(models.WordLevel({"</s>": 0, "a": 1}, unk_token="</s>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(["</s>"])
    made.save(str(tmp_path / "t.json"))
    tokenizer = load_tokenizer(str(tmp_path / "t.json"))
    assert tokenizer.encode("a a").tolist() == [1, 1]
    with pytest.raises(ValueError, match=r"data\.tokenizer: .*t\.json turns text into its special token </s>\.$"):
        tokenizer.encode("a b")
