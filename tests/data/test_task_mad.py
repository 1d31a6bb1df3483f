"""The six MAD tasks: oracles, chance, what the splits ask, vocabularies and frequencies."""

from itertools import groupby

import numpy as np
import pytest
from promises import check_promises, close

from delta_jax.data.tasks import (
    Compression,
    FuzzyRecall,
    InContextRecall,
    Memorization,
    NoisyRecall,
    SelectiveCopying,
)
from delta_jax.data.tasks.examples import IGNORED, draw


def dictionary_lookup(task, row):
    values = task.values
    return [values[row[place - 1]] if place % 2 else IGNORED for place in range(len(row))]


def copy(task, row):
    tokens = [token for token in row[: -task.copies - 1] if token < task.vocab_size - 2]
    return [IGNORED] * (task.length - task.copies) + tokens


def known_pairs(task, row):
    values, answers = {}, []
    for key, value in zip(row[::2], row[1::2], strict=True):
        answers += [values.get(key, IGNORED), IGNORED]
        if key < task.vocab_size - task.noise_tokens:
            values[key] = value
    return answers


def runs(task, row):
    """(key, value, where the value starts) of every pair of a fuzzy sequence, from the kinds of tokens alone."""
    place, motifs = 0, []
    for kind, tokens in groupby(
        row.tolist(), lambda t: 0 if t < (task.vocab_size - 1) // 2 else 1 + (t == task.vocab_size - 1)
    ):
        motif = tuple(tokens)
        motifs.append((kind, motif, place))
        place += len(motif)
    motifs = motifs[1:] if motifs[0][0] == 2 else motifs
    assert [kind for kind, _, _ in motifs] == [0, 1] * (len(motifs) // 2)
    return [(key, value, start) for (_, key, _), (_, value, start) in zip(motifs[::2], motifs[1::2], strict=True)]


def known_motifs(task, row):
    values, answers = {}, [IGNORED] * len(row)
    for key, value, start in runs(task, row):
        if key in values:
            assert values[key] == value
            answers[start - 1 : start - 1 + len(value)] = value
        values[key] = value
    return answers


def compress_guess(rng, examples):
    guess = rng.integers(0, examples.inputs.max(), examples.inputs.shape)
    guess[:, -1] = examples.inputs.max()
    return guess


@pytest.mark.parametrize(
    ("task", "oracle", "guesses"),
    [
        (Memorization(), dictionary_lookup, range(127, 254)),
        (Memorization(vocab_size=512, map_seed=1), dictionary_lookup, range(255, 510)),
        (Compression(), lambda task, row: row, compress_guess),
        (Compression(vocab_size=64, length=64), lambda task, row: row, compress_guess),
        (SelectiveCopying(), copy, range(14)),
        (SelectiveCopying(length=65, copies=32), copy, range(14)),
        (InContextRecall(), known_pairs, range(8, 16)),
        (InContextRecall(vocab_size=65, length=64), known_pairs, range(32, 65)),
        (NoisyRecall(), known_pairs, range(8, 16)),
        (NoisyRecall(vocab_size=48, noise=0.8), known_pairs, range(16, 32)),
        (FuzzyRecall(), known_motifs, range(7, 15)),
        (FuzzyRecall(vocab_size=9, length=40, key_size=1, value_size=2), known_motifs, range(4, 8)),
    ],
    ids=lambda value: getattr(value, "__name__", repr(value)),
)
def test_promises(task, oracle, guesses):
    check_promises(task, oracle, guesses)


@pytest.mark.parametrize("task", [InContextRecall(), NoisyRecall(), FuzzyRecall()], ids=repr)
def test_recall_trains_on_every_next_token(task):
    examples = draw(task, 50, split="train", seed=0)
    np.testing.assert_array_equal(examples.targets[:, :-1], examples.inputs[:, 1:])
    assert (examples.targets[:, -1] == IGNORED).all()


def test_the_dictionary_is_fixed_and_one_to_one():
    values = Memorization().values
    assert sorted(values) == list(range(127, 254))
    np.testing.assert_array_equal(values, Memorization(length=8).values)
    assert not np.array_equal(values, Memorization(map_seed=1).values)
    keys = draw(Memorization(), 2000, split="train", seed=0).inputs[:, ::2]
    assert close(np.bincount(keys.ravel(), minlength=127), np.full(127, 1 / 127))


def test_compression_is_uniform():
    inputs = draw(Compression(), 2000, split="train", seed=0).inputs
    assert (inputs[:, -1] == 15).all()
    assert close(np.bincount(inputs[:, :-1].ravel(), minlength=15), np.full(15, 1 / 15))


def test_blanks_fall_before_tokens_at_random():
    task = SelectiveCopying(length=40, copies=4)
    inputs = task.sample(np.random.default_rng(0), 4000, "train").inputs
    assert (inputs[:, 35] == 15).all() and (inputs[:, 36:] == 14).all() and (inputs[:, 34] < 14).all()
    places = np.nonzero(inputs[:, :35] < 14)[1].reshape(-1, 4)
    before = np.diff(places, axis=1, prepend=-1) - 1
    for column in before.T:  # binomial: 31 blanks, a quarter each
        assert abs(column.mean() - 31 / 4) < 0.17 and abs(column.var() - 31 * 3 / 16) < 0.6
    assert close(np.bincount(inputs[inputs < 14], minlength=14), np.full(14, 1 / 14))


def test_recall_draws_keys_and_values_uniformly_with_replacement():
    inputs = InContextRecall(vocab_size=10).sample(np.random.default_rng(0), 2000, "train").inputs
    assert close(np.bincount(inputs[:, :-2:2].ravel(), minlength=5), np.full(5, 0.2))
    assert close(np.bincount(inputs[:, 1], minlength=10)[5:], np.full(5, 0.2))
    assert (inputs[:, 1::2] >= 5).all()
    # Two keys of one sequence have the same value as often as chance says.
    other = inputs[:, 2] != inputs[:, 0]
    assert abs((inputs[other, 1] == inputs[other, 3]).mean() - 0.2) < 0.05


def test_noise():
    task = NoisyRecall(length=20)
    inputs = task.sample(np.random.default_rng(0), 20_000, "train").inputs
    slots = inputs.reshape(-1, 10, 2)
    noisy = slots[..., 0] >= 16
    np.testing.assert_array_equal(noisy, slots[..., 1] >= 16)
    assert not noisy[:, -1].any() and not noisy.all(axis=1).any()
    # One of the nine slots before the probe is no noise for certain, the others with probability 0.8.
    assert np.abs(noisy[:, :-1].mean(axis=0) - 0.2 * 8 / 9).max() < 0.012
    assert close(np.bincount(slots[noisy].ravel(), minlength=32)[16:], np.full(16, 1 / 16))
    assert (InContextRecall().sample(np.random.default_rng(0), 100, "test").inputs < 16).all()


@pytest.mark.parametrize("split", ["train", "test"])
def test_motifs(split):
    task = FuzzyRecall()
    examples = task.sample(np.random.default_rng(0), 1500, split)
    pairs = [runs(task, row) for row in examples.inputs]
    firsts = [row[0] for row in pairs]
    key_sizes = np.bincount([len(key) for key, _, _ in firsts], minlength=4)[1:]
    assert close(key_sizes, np.full(3, 1 / 3) if split == "train" else [0, 0, 1])
    assert close(np.bincount([len(value) for _, value, _ in firsts], minlength=4)[1:], np.full(3, 1 / 3))
    for row in pairs:
        assert all(len(set(motif)) == len(motif) for pair in row for motif in pair[:2])
        assert row[-1][0] in [key for key, _, _ in row[:-1]]
    # What does not fit a longest pair more is padding: at most 5 for the context, 4 for the last pair.
    pads = (examples.inputs == 15).sum(axis=1)
    assert (examples.inputs[np.arange(128) < pads[:, None]] == 15).all()
    assert pads.max() <= 9 and pads.min() == 0
    letters = np.bincount([key[0] for key, _, _ in firsts], minlength=7)
    assert close(letters, np.full(7, 1 / 7))


@pytest.mark.parametrize(
    ("kind", "options", "named"),
    [
        (Memorization, {"length": 31}, "length"),
        (Memorization, {"vocab_size": 4}, "vocab_size"),
        (Compression, {"vocab_size": 2}, "vocab_size"),
        (Compression, {"length": 1}, "length"),
        (SelectiveCopying, {"length": 32}, "length"),
        (SelectiveCopying, {"vocab_size": 3}, "vocab_size"),
        (SelectiveCopying, {"copies": 0}, "copies"),
        (InContextRecall, {"length": 127}, "length"),
        (InContextRecall, {"noise": 0.1}, "noise_tokens"),
        (InContextRecall, {"vocab_size": 1}, "vocab_size"),
        (NoisyRecall, {"noise": 1.0}, "noise"),
        (NoisyRecall, {"vocab_size": 17}, "vocab_size"),
        (FuzzyRecall, {"vocab_size": 6}, "vocab_size"),
        (FuzzyRecall, {"length": 11}, "length"),
        (FuzzyRecall, {"key_size": 0}, "key_size"),
    ],
)
def test_refusals(kind, options, named):
    with pytest.raises(ValueError) as error:
        kind(**options)
    assert named in str(error.value)
