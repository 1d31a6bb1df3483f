"""Text as it is written is the tokenizer's text of the whole, and no character is shown by halves."""

import itertools

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from delta_jax.data import ByteTokenizer, load_tokenizer
from delta_jax.inference import Detokenizer
from delta_jax.inference.text import Row

TEXT = "Na\u00efve  caf \u2014 \U0001f600\U0001f680 \u65e5\u672c\u8a9e, it's e\u0301t\u00e9.\n  Two  spaces\ttab \ufffd end"


def byte_fallback():
    """As Llama's: SentencePiece's space, bytes for what is not in the vocabulary."""
    vocab = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocab += ["\u2581", "N", "a", "c", "f", "i", "t", "'", "s", "e", "n", "d", "T", "w", "o", "p", "\u2581t", "\u2581a"]
    tokenizer = Tokenizer(
        models.BPE(
            {piece: id for id, piece in enumerate(vocab)}, [("\u2581", "t")], unk_token="<unk>", byte_fallback=True
        )
    )
    tokenizer.add_special_tokens(["<unk>", "</s>"])
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def trained(model, trainer, pre_tokenizer, decoder):
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoder
    options = {"special_tokens": ["</s>", "<unk>"], "show_progress": False, "vocab_size": 290}
    tokenizer.train_from_iterator([TEXT] * 3, trainer(**options))
    return tokenizer


def byte_level():
    trainer = lambda **options: trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **options)  # noqa: E731
    return trained(models.BPE(), trainer, pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel())


def metaspace():
    trainer = lambda **options: trainers.UnigramTrainer(unk_token="<unk>", **options)  # noqa: E731
    return trained(models.Unigram(), trainer, pre_tokenizers.Metaspace(), decoders.Metaspace())


def word_pieces():
    split = pre_tokenizers.WhitespaceSplit()
    return trained(models.WordPiece(unk_token="<unk>"), trainers.WordPieceTrainer, split, decoders.WordPiece())


def suffixes():
    trainer = lambda **options: trainers.BpeTrainer(end_of_word_suffix="</w>", **options)  # noqa: E731
    model = models.BPE(end_of_word_suffix="</w>")
    return trained(model, trainer, pre_tokenizers.WhitespaceSplit(), decoders.BPEDecoder())


@pytest.fixture(scope="module", params=[None, byte_level, byte_fallback, metaspace, word_pieces, suffixes])
def tokenizer(request, tmp_path_factory):
    if request.param is None:
        return ByteTokenizer()
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    request.param().save(str(path))
    return load_tokenizer(str(path))


def pieces(tokenizer, ids, before=()):
    text = Detokenizer(tokenizer, before)
    return [*(text.add(int(id)) for id in ids), text.end()]


def test_pieces_are_the_text_of_the_whole(tokenizer):
    ids = tokenizer.encode(TEXT).tolist()
    for place in range(0, len(ids), 7):
        found = pieces(tokenizer, ids[place:], ids[:place])
        whole, before = tokenizer.decode(ids), tokenizer.decode(ids[:place])
        if not before.endswith("\ufffd"):  # a character cut in two has no text of its own
            assert before + "".join(found) == whole
        assert "".join(found).count("\ufffd") <= tokenizer.decode(ids[place:]).count("\ufffd")
    special = [tokenizer.document_id, *ids[:9], tokenizer.document_id, *ids[9:]]
    assert "".join(pieces(tokenizer, special[1:], special[:1])) == tokenizer.decode(special)
    assert "".join(pieces(tokenizer, ids, [tokenizer.document_id] * 20)) == tokenizer.decode(ids)


def test_no_character_is_shown_by_halves(tokenizer):
    text = "\u65e5\U0001f600\u00e9e"
    ids = tokenizer.encode(text).tolist() if tokenizer.decode(tokenizer.encode(text)) == text else []
    found = pieces(tokenizer, ids)
    assert "\ufffd" not in "".join(found)
    assert "".join(found) == (text if ids else "")
    if isinstance(tokenizer, ByteTokenizer):
        assert found == ["", "", "\u65e5", "", "", "", "\U0001f600", "", "\u00e9", "e", ""]


def test_bytes_that_are_no_text_show_as_the_tokenizer_shows_them():
    tokenizer = ByteTokenizer()
    random = np.random.default_rng(0)
    for size in (5, 30, 200):
        for high in (256, 200):
            ids = random.integers(120, high, size).tolist()
            assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)
    cut = b"\x80" * 50 + "\u65e5".encode()[:2]
    found = pieces(tokenizer, cut)
    assert "".join(found) == tokenizer.decode(cut)
    assert max(map(len, found)) <= 8  # and they are not all held back
    assert "".join(pieces(tokenizer, "\u65e5".encode(), cut)) != ""


def test_a_stop_string_is_found_in_text_whatever_the_blocks():
    tokenizer, data = ByteTokenizer(), "a\u65e5b\u65e5c<e><end>rest".encode()
    for stops, size in itertools.product(
        [("<end>",), ("zz", "<end>", "<end"), ("\u65e5c",), ("<end>rest!", "q")], (1, 3, 50)
    ):
        row = Row(np.zeros(257, bool), stops, 100, Detokenizer(tokenizer))
        found = [row.add(data[start : start + size]) for start in range(0, len(data), size)]
        text = data.decode()
        ends = [text.index(stop) for stop in stops if stop in text]
        wanted = text[: min(ends)] if ends else text
        shown = "".join(piece.text for piece in found)
        assert shown == wanted if ends else wanted.startswith(shown)
        assert bytes(token for piece in found for token in piece.tokens) == shown.encode()
        assert row.finish == ("stop" if ends else None)
        assert "<e" not in "".join(piece.text for piece in found[:-1]) or "<e>" in shown


def test_a_row_that_ends_inside_a_character_shows_that_it_was_cut():
    row = Row(np.zeros(257, bool), (), 3, Detokenizer(ByteTokenizer()))
    assert row.add(b"a\xe6").tokens == [97]
    piece = row.add(b"\x97\xa5")
    assert (piece.tokens, piece.text, piece.finish) == ([0xE6, 0x97], "\ufffd", "length")
