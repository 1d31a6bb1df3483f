"""The measures against a float64 computation by hand."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from delta_jax.data import DataConfig, bigram_bits_per_byte, split, validation_batches, validation_bytes
from delta_jax.evaluation import evaluate

VOCABULARY = 11


def make_batches(count=3, batch=4, time=9, seed=0):
    generator = np.random.default_rng(seed)
    for _ in range(count):
        yield {
            "inputs": generator.integers(0, VOCABULARY, (batch, time), np.int32),
            "targets": generator.integers(0, VOCABULARY, (batch, time), np.int32),
            "segment_ids": generator.integers(0, 3, (batch, time), np.int32),
            "mask": generator.integers(0, 2, (batch, time)).astype(np.float32),
        }


class Toy(nnx.Module):
    """Logits are a table row of the input plus a table row of the segment."""

    def __init__(self, rngs):
        self.table = nnx.Param(3.0 * jax.random.normal(rngs.params(), (VOCABULARY, VOCABULARY)))
        self.segment = nnx.Param(jax.random.normal(rngs.params(), (3, VOCABULARY)))

    def __call__(self, tokens, *, segment_ids):
        return self.table[...][tokens] + self.segment[...][segment_ids]


class Table(nnx.Module):
    """Logits are a table row of the input."""

    def __init__(self, table):
        self.table = nnx.Param(table)

    def __call__(self, tokens, *, segment_ids):
        return self.table[...][tokens]


def by_hand(model, batches):
    table, segment = np.asarray(model.table[...], np.float64), np.asarray(model.segment[...], np.float64)
    nats = tokens = 0.0
    for batch in batches:
        logits = table[batch["inputs"]] + segment[batch["segment_ids"]]
        log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        chosen = np.take_along_axis(log_probabilities, batch["targets"][..., None], -1)[..., 0]
        nats -= (chosen * batch["mask"]).sum()
        tokens += batch["mask"].sum()
    return nats, tokens


def test_module_against_float64():
    model = Toy(nnx.Rngs(0))
    result = evaluate(model, make_batches(), bytes=37)
    nats, tokens = by_hand(model, make_batches())
    assert result.tokens == tokens
    assert result.bytes == 37
    assert result.loss == pytest.approx(nats / tokens, rel=1e-6)
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / 37, rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(nats / tokens), rel=1e-5)


def test_function_equals_module():
    model = Toy(nnx.Rngs(1))
    table, segment = model.table[...], model.segment[...]

    def logits(tokens, *, segment_ids):
        return table[tokens] + segment[segment_ids]

    assert evaluate(logits, make_batches(), bytes=5) == evaluate(model, make_batches(), bytes=5)


def test_uniform_model_has_the_vocabulary_as_perplexity():
    def uniform(tokens, *, segment_ids):
        return jnp.zeros((*tokens.shape, VOCABULARY))

    result = evaluate(uniform, make_batches(), bytes=1)
    assert result.perplexity == pytest.approx(VOCABULARY, rel=1e-6)


def test_what_the_mask_hides_cannot_matter():
    def poisoned(tokens, *, segment_ids):
        logits = jnp.ones((*tokens.shape, VOCABULARY)) * tokens[..., None].astype(jnp.float32)
        return jnp.where(segment_ids[..., None] == 0, jnp.nan, logits)

    def hidden():
        for batch in make_batches():
            yield batch | {"mask": batch["mask"] * (batch["segment_ids"] > 0)}

    result = evaluate(poisoned, hidden(), bytes=1)
    assert result.loss == pytest.approx(math.log(VOCABULARY), rel=1e-6)

    def negative():
        for batch in hidden():
            counts = batch["mask"] > 0
            yield batch | {"mask": np.ones_like(batch["mask"]), "targets": np.where(counts, batch["targets"], -100)}

    assert evaluate(poisoned, negative(), bytes=1) == result


def test_a_second_evaluation_compiles_nothing():
    class Once(Toy):
        __call__ = chex.assert_max_traces(Toy.__call__, 1)

    for seed in range(3):
        evaluate(Once(nnx.Rngs(seed)), make_batches(), bytes=1)
    with pytest.raises(AssertionError, match="traced"):
        evaluate(Once(nnx.Rngs(0)), make_batches(time=7), bytes=1)


def test_bits_per_byte_of_a_bigram_model_is_the_baseline(tmp_path):
    """The baseline and a model with the same predictions agree: they count the same targets and bytes."""
    generator = np.random.default_rng(0)
    for number in range(12):
        (tmp_path / f"{number}.txt").write_text("".join(generator.choice(list("abc \u00e9"), size=200)))
    config = DataConfig(path=str(tmp_path), validation_fraction=0.3)
    training, _ = split(config)
    counts = np.zeros((257, 257))
    for index in range(len(training)):
        symbols = np.array([256, *training[index].encode(), 256])
        np.add.at(counts, (symbols[:-1], symbols[1:]), 1)

    def baseline(alpha):
        return evaluate(
            Table(jnp.asarray(np.log(counts + alpha), jnp.float32)),
            validation_batches(config, batch_size=3, sequence_length=64),
            bytes=validation_bytes(config),
        ).bits_per_byte

    wanted = bigram_bits_per_byte(config)
    assert min(abs(baseline(alpha) - wanted) for alpha in np.geomspace(1e-4, 10.0, 26)) < 1e-5


def test_nothing_to_evaluate():
    def logits(tokens, *, segment_ids):
        return jnp.zeros((*tokens.shape, VOCABULARY))

    with pytest.raises(ValueError, match="no target to evaluate on"):
        evaluate(logits, [], bytes=1)
    with pytest.raises(ValueError, match="bytes must be at least 1; got 0"):
        evaluate(logits, make_batches(), bytes=0)
