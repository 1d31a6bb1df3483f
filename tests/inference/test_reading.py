"""Prompts are read once, and what may follow is measured, without a compilation for each length."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from delta_jax.inference import log_probabilities, read_prompts, take_rows
from delta_jax.inference.reading import _read, _score
from tests.inference.conftest import make

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3], [9], [2, 6, 5, 3]]
CONTINUATIONS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 1, 2]]


@pytest.fixture(scope="module")
def model():
    return make("gated_delta_net", "attention")


def whole(model, texts):
    """Logits of whole texts, padded to one length."""
    tokens = np.zeros((len(texts), 32), np.int32)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = text
    return jax.jit(lambda model, tokens: model(tokens))(model, jnp.asarray(tokens))


def test_rows_are_those_of_each_prompt_alone_and_may_be_read_in_parts(model):
    logits = whole(model, PROMPTS)
    wanted = [row[len(prompt) - 1] for row, prompt in zip(logits, PROMPTS, strict=True)]
    reading = read_prompts(model, PROMPTS)
    np.testing.assert_allclose(reading.logits, wanted, atol=1e-5)
    np.testing.assert_array_equal(reading.seen.sum(axis=1), [len(set(prompt)) for prompt in PROMPTS])
    parts = read_prompts(model, [prompt[:3] for prompt in PROMPTS])
    parts = read_prompts(model, [prompt[3:] for prompt in PROMPTS], after=parts)
    np.testing.assert_allclose(parts.logits, wanted, atol=1e-5)
    np.testing.assert_array_equal(parts.seen, reading.seen)
    assert parts.lengths.tolist() == reading.lengths.tolist() == [10, 1, 4]
    one = take_rows(reading, [1])
    same = read_prompts(model, [[], [3, 1]], after=one)  # nothing more is what was there
    np.testing.assert_array_equal(same.logits[0], one.logits[0])


def test_log_probabilities_are_those_of_the_whole_text(model):
    reading = read_prompts(model, PROMPTS)
    rows = [0, 0, 2]
    scored = log_probabilities(model, take_rows(reading, rows), CONTINUATIONS)
    texts = [PROMPTS[row] + continuation for row, continuation in zip(rows, CONTINUATIONS, strict=True)]
    for score, text, logits, continuation in zip(scored, texts, whole(model, texts), CONTINUATIONS, strict=True):
        there = logits[len(text) - len(continuation) - 1 : len(text) - 1]
        wanted = jax.nn.log_softmax(there)[np.arange(len(continuation)), np.asarray(continuation)]
        np.testing.assert_allclose(score.log_probabilities, wanted, atol=1e-5)
        np.testing.assert_array_equal(score.greedy, jnp.argmax(there, axis=-1) == jnp.asarray(continuation))
    likeliest = [[int(token)] for token in jnp.argmax(reading.logits, axis=-1)]
    assert all(score.greedy.all() for score in log_probabilities(model, reading, likeliest))


def test_lengths_do_not_compile(model):
    reading = read_prompts(model, PROMPTS)
    log_probabilities(model, reading, CONTINUATIONS)
    counts = _read._cache_size(), _score._cache_size()
    for length in (5, 6, 8):
        longer = read_prompts(model, [[7] * 2 * length, [1, 2], [3]])
        log_probabilities(model, longer, [[5] * length, [1], [2]])
    assert (_read._cache_size(), _score._cache_size()) == counts
    prefix = take_rows(reading, [0])
    for length in (1, 5, 8):
        read_prompts(model, [[3] * length] * 3, after=prefix)
        counts = (_read._cache_size(), counts[1]) if length == 1 else counts
    assert (_read._cache_size(), _score._cache_size()) == counts


def test_room_grows_where_attention_keeps_every_token():
    model, text = make("attention"), np.arange(330) % 37
    reading = read_prompts(model, [text[:200]])
    assert reading.room == 512
    reading = read_prompts(model, [text[200:325]], after=reading)
    (score,) = log_probabilities(model, reading, [text[325:]])
    (logits,) = jax.jit(lambda model, tokens: model(tokens))(model, jnp.asarray(text[None], jnp.int32))
    wanted = jax.nn.log_softmax(logits[324:-1])[np.arange(5), text[325:]]
    np.testing.assert_allclose(score.log_probabilities, wanted, atol=1e-5)


def test_mistakes_are_named(model):
    other = make("attention")
    reading = read_prompts(model, PROMPTS)
    for call, words in (
        (lambda: read_prompts(model, [[1], [2]], after=reading), "one row, or one for each of 2 prompts, got 3"),
        (lambda: read_prompts(other, PROMPTS, after=reading), "after is another model's: cache must be one of"),
        (lambda: read_prompts(model, PROMPTS, after=reading.cache), "after must be a Reading"),
        (lambda: log_probabilities(model, reading, [[1]]), "continuations must be one for each of 3 rows"),
        (lambda: log_probabilities(model, reading, [[1], [], [2]]), "continuation 1 is empty"),
        (lambda: log_probabilities(model, reading, [[1], [40], [2]]), "continuation 1 holds a token outside"),
        (lambda: log_probabilities(other, reading, CONTINUATIONS), "reading is another model's"),
        (lambda: take_rows(reading, [3]), r"rows must be integers in \[0, 3\)"),
        (lambda: take_rows(reading, []), r"rows must be integers in \[0, 3\), at least one"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
