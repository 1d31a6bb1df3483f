"""Bits per byte are of the bytes of the documents, whatever the tokenizer makes of them and wherever rows end."""

import dataclasses
import json
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, models

from delta_jax.data import (
    DataConfig,
    DataError,
    load_tokenizer,
    split,
    train_batches,
    validation_batches,
    validation_bytes,
)
from delta_jax.evaluation import evaluate

WORDS = [
    "\u65e5\u672c\u8a9e",
    "\u306e",
    "\u6587\u7ae0",
    "\u3067\u3059\u3002",
    "caf\u00e9",
    "\U0001f600",
    "plain ",
    "<|endoftext|>",
]


@pytest.fixture
def japanese(tmp_path):
    generator = np.random.default_rng(1)
    texts = ["".join(generator.choice(WORDS, size=generator.integers(1, 40))) for _ in range(40)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return DataConfig(path=str(tmp_path / "a.jsonl"), validation_fraction=0.3, shuffle_rows=1)


@pytest.fixture
def lossy(tmp_path):
    """A tokenizer that knows the letters of "plain " and drops all else without a word."""
    made = Tokenizer(models.BPE({token: id for id, token in enumerate(["<|endoftext|>", *"plain "])}, []))
    made.add_special_tokens(["<|endoftext|>"])
    made.save(str(tmp_path / "lossy.json"))
    return str(tmp_path / "lossy.json")


def held_out_bytes(config):
    validation = split(config)[1]
    return sum(len(validation[index].encode()) for index in range(len(validation)))


@pytest.mark.parametrize("length", [2, 7, 64])
def test_bytes_of_rows_sum_to_those_of_the_documents(japanese, write_tokenizer, length):
    wanted = held_out_bytes(japanese)
    for tokenizer in ("bytes", write_tokenizer("".join(WORDS[:4]), ["<|endoftext|>"])):
        config = dataclasses.replace(japanese, tokenizer=tokenizer)
        batches = list(validation_batches(config, batch_size=3, sequence_length=length))
        assert sum(int(batch["bytes"].sum()) for batch in batches) == wanted == validation_bytes(config)
        assert all(not batch["bytes"][batch["mask"] == 0].any() for batch in batches)
        if tokenizer != "bytes":
            # Which document a row is from does not matter: between two document ids lie the bytes of a document.
            ids, sizes = (np.concatenate([b[name][b["mask"] > 0] for b in batches]) for name in ("targets", "bytes"))
            document = load_tokenizer(tokenizer).document_id
            sums = [int(part.sum()) for part in np.split(sizes, np.flatnonzero(ids == document) + 1)[:-1]]
            validation = split(config)[1]
            assert sorted(sums) == sorted(len(validation[index].encode()) for index in range(len(validation)))


def test_bits_per_byte_of_a_uniform_model(japanese, write_tokenizer):
    config = dataclasses.replace(japanese, tokenizer=write_tokenizer("".join(WORDS[:4]), ["<|endoftext|>"]))

    def uniform(tokens, *, segment_ids):
        return jnp.zeros((*tokens.shape, 512))

    for length in (3, 50):
        batches = list(validation_batches(config, batch_size=4, sequence_length=length))
        result = evaluate(uniform, batches)
        assert result.bytes == held_out_bytes(config)
        assert result.bits_per_byte == pytest.approx(9 * result.tokens / result.bytes, rel=1e-6)
        part = evaluate(uniform, batches[:1])  # of a part of the batches, the bytes of that part
        assert part.bytes == batches[0]["bytes"].sum() < result.bytes
    hidden = [batch | {"mask": batch["mask"] * (np.arange(50) < 9)} for batch in batches]
    assert evaluate(uniform, hidden).bytes == sum(batch["bytes"][:, :9].sum() for batch in batches)
    bare = [{name: batch[name] for name in batch if name != "bytes"} for batch in batches]
    assert evaluate(uniform, bare, bytes=70).bytes == 70
    with pytest.raises(ValueError, match='batches: they have no "bytes"'):
        evaluate(uniform, bare)
    with pytest.raises(ValueError, match="the targets stand for no byte"):
        evaluate(uniform, [batch | {"bytes": 0 * batch["bytes"]} for batch in batches])


def test_bytes_of_training_rows_are_those_of_their_targets(japanese):
    batch = next(train_batches(japanese, batch_size=4, sequence_length=32))
    np.testing.assert_array_equal(batch["bytes"], batch["targets"] < 256)


def test_a_tokenizer_that_loses_text_is_told_once_and_its_bits_are_of_all_bytes(japanese, lossy):
    config = dataclasses.replace(japanese, tokenizer=lossy)
    training = split(config)[0]
    text = "".join(training[index] for index in range(len(training)))
    lost = sum(len(character.encode()) for character in text if character not in "plain ")
    share = f"{lost / len(text.encode()):.2%}"

    def start():
        for _ in range(2):
            train_batches(config, batch_size=1, sequence_length=8)
            batches = list(validation_batches(config, batch_size=1, sequence_length=8))
        return batches

    with pytest.warns(UserWarning, match=rf"lossy\.json loses {share} of the bytes of .* \({lost:,} of ") as warned:
        batches = start()
    assert len(warned) == 1
    assert sum(int(batch["bytes"].sum()) for batch in batches) == held_out_bytes(config)


def test_nothing_is_said_of_a_tokenizer_that_loses_nothing(japanese, write_tokenizer):
    config = dataclasses.replace(japanese, tokenizer=write_tokenizer("".join(WORDS[:4]), ["<|endoftext|>"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batches = train_batches(config, batch_size=2, sequence_length=16)
        document = load_tokenizer(config.tokenizer).document_id
        rows = [next(batches) for _ in range(30)]
    ends = sum(int((row["targets"] == document).sum()) for row in rows)
    texts = sum(row["mask"].sum() for row in rows)
    assert 0 < ends < texts / 10  # WORDS has the text of the document's token


def test_text_that_would_become_a_special_token_is_a_fault_of_its_document(japanese, tmp_path):
    made = Tokenizer(models.WordLevel({"</s>": 0, "a": 1}, unk_token="</s>"))
    made.add_special_tokens(["</s>"])
    made.save(str(tmp_path / "t.json"))
    config = dataclasses.replace(japanese, tokenizer=str(tmp_path / "t.json"))
    with pytest.raises(DataError, match=r"turns text into its special token </s> \(in .*a\.jsonl, line \d+\)\.$"):
        train_batches(config, batch_size=1, sequence_length=8)
