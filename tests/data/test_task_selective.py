"""SelectivBench: the grammar, the law of strings, gaps, noise, distractors, votes."""

import numpy as np
import pytest
from laws import assert_uniform

from delta_jax.data.tasks import SelectivBench
from delta_jax.data.tasks.examples import IGNORED, draw, identities
from delta_jax.data.tasks.scores import voted

SMALL = {"ambiguity": 6, "depth": 4, "elements": 100}


def sample(number, **options):
    task = SelectivBench(**options)
    return task, task.sample(np.random.default_rng(0), number, "train")


def test_the_grammar():
    task = SelectivBench()
    successor, reach = task.grammar
    assert successor.shape == (1601, 41) and task.states == task.vocab_size == 1601
    edges = successor[:-1, :-1] >= 0
    assert abs(edges.mean() - 0.4) < 4 * np.sqrt(0.4 * 0.6 / edges.size)
    ends = (successor[:-1, -1] == 1600).sum()
    assert abs(ends - 16) < 4 * np.sqrt(16)
    for letter in range(40):
        targets = successor[:-1, letter]
        assert_uniform(targets[targets >= 0] - 40 * letter, range(40))
    assert (successor[-1] >= 0).sum() == 4 and successor[-1, -1] == -1
    assert reach[-1].min() > 0
    assert not np.array_equal(SelectivBench(grammar_seed=1).grammar.successor, successor)
    np.testing.assert_array_equal(SelectivBench(gap=(10, 10), noise=0.2).grammar.successor, successor)


def test_edges_are_equally_likely_and_states_follow_the_grammar():
    # So few states that the limit of 200 letters plays no role.
    task, examples = sample(4000, ambiguity=4, depth=2, elements=60, gap=(0, 0))
    successor, previous = task.grammar.successor, np.full(4000, task.states - 1)
    counts = np.zeros(successor.shape)
    for index in range(60):
        state, letter = examples.targets[:, index], examples.inputs[:, index]
        np.testing.assert_array_equal(state, successor[previous, letter])
        np.testing.assert_array_equal(state // 2, letter)
        np.add.at(counts, (previous, letter), 1)
        previous = state
    for state in range(len(successor)):
        expected = np.where(successor[state] >= 0, counts[state].sum() / (successor[state] >= 0).sum(), 0)
        assert (np.abs(counts[state] - expected) <= 4.5 * np.sqrt(expected)).all()


def test_strings_are_those_that_end_within_200_letters():
    """Against walks on the same grammar without the condition, the long ones thrown away."""
    task, examples = sample(4000, ambiguity=20, elements=201, gap=(0, 0))
    ours = np.argmax(examples.inputs == task.ambiguity, axis=1)
    assert (examples.inputs[np.arange(4000), ours] == task.ambiguity).all() and ours.min() >= 1 and ours.max() <= 200
    rng, successor = np.random.default_rng(1), task.grammar.successor
    state, length = np.full(16_000, task.states - 1), np.zeros(16_000, int)
    for index in range(201):
        keys = np.where(successor[state] >= 0, rng.random((len(state), 21)), -1)
        letter = keys.argmax(axis=1)
        state = np.where(length > 0, state, successor[state, letter])
        length = np.where((length == 0) & (state == task.states - 1), index, length)
    walked = length[length > 0]
    assert 0.1 < len(walked) / 16_000 < 0.9
    error = np.sqrt(ours.var() / len(ours) + walked.var() / len(walked))
    assert abs(ours.mean() - walked.mean()) < 4 * error
    bins = np.arange(1, 202, 20)
    a, b = np.histogram(ours, bins)[0] / len(ours), np.histogram(walked, bins)[0] / len(walked)
    assert np.abs(a - b).max() < 4.5 * np.sqrt(2 * a.max() / len(walked))


def test_gaps():
    task, examples = sample(500, **SMALL, gap=(1, 10))
    assert examples.inputs.shape == (500, 1100)
    inside = examples.targets != IGNORED
    assert (np.diff(inside.astype(int), axis=1) <= 0).all()  # padding is behind
    np.testing.assert_array_equal(np.diff(examples.answers, axis=1) == 1, examples.inputs[:, 1:] != task.blank)
    assert (examples.answers.max(axis=1) == 99).all() and (examples.answers[:, 0] == 0).all()
    frames = np.array([np.bincount(row[keep]) for row, keep in zip(examples.answers, inside, strict=True)])
    assert_uniform(frames - 1, range(1, 11))
    assert (np.diff(examples.targets, axis=1)[(np.diff(examples.answers, axis=1) == 0) & inside[:, 1:]] == 0).all()
    _, constant = sample(20, **SMALL, gap=(100, 100))
    assert constant.inputs.shape == (20, 10_100) and (constant.targets != IGNORED).all()


def test_noise_is_added_to_the_letters_and_the_blanks():
    _, noisy = sample(200, **SMALL, gap=(1, 2), noise=0.2)
    _, clean = sample(200, **SMALL, gap=(1, 2))
    assert noisy.inputs.dtype == np.float32 and noisy.inputs.shape == (200, 300, 7)
    np.testing.assert_array_equal(noisy.targets, clean.targets)
    ones = clean.inputs[..., None] == np.arange(7)
    added = noisy.inputs - ones
    assert added.min() >= 0 and added.max() <= 0.2 + 1e-6
    assert_uniform(np.floor(added * 50).clip(0, 9).astype(int), range(10))
    assert noisy.inputs[ones].min() >= 1
    np.testing.assert_array_equal(noisy.identity, clean.identity)


def test_distractors():
    task, examples = sample(3000, **SMALL, gap=(0, 0), distractors=0.1, distractors_from=20)
    strange = examples.targets == IGNORED
    assert not strange[:, :21].any() and strange[:, 21].any() and not (strange[:, 1:] & strange[:, :-1]).any()
    successor, state = task.grammar.successor, np.full(3000, task.states - 1)
    possible, after = (successor[:, :6] < 0).any(axis=1), []
    for index in range(100):
        letter = examples.inputs[:, index]
        if index > 20:
            after += strange[:, index][possible[state] & ~strange[:, index - 1]].tolist()
            assert not strange[:, index][~possible[state]].any()
        assert (successor[state, letter][strange[:, index]] == -1).all()
        assert (letter[strange[:, index]] < 6).all()
        state = np.where(strange[:, index], state, successor[state, letter])
        np.testing.assert_array_equal(examples.targets[:, index][~strange[:, index]], state[~strange[:, index]])
    assert abs(np.mean(after) - 0.1) < 4 * np.sqrt(0.1 * 0.9 / len(after))


@pytest.mark.parametrize("distractors", [0.0, 0.2])
def test_frames_of_an_element_vote_together(distractors):
    options = {"ambiguity": 5, "depth": 3, "elements": 40, "distractors": distractors, "distractors_from": 3}
    task, examples = sample(50, **options, gap=(1, 4))
    rng = np.random.default_rng(0)
    probabilities = 0.02 * rng.random((*examples.targets.shape, task.states))
    frames = np.eye(task.states)[np.maximum(examples.targets, 0)]
    first = np.diff(examples.answers, axis=1, prepend=-1) == 1
    wanted, predictions = voted(examples.answers, examples.targets, probabilities + frames * first[..., None], 40)
    assert wanted.shape == (50, 40)
    asked = wanted != IGNORED
    assert asked.all() == (distractors == 0) and asked.mean() > 0.7
    assert (predictions == wanted)[asked].all()


def test_the_split_ignores_gaps_and_noise():
    """Tasks of one grammar never show at test time what another trained on, nor is the test set a part of the train set."""
    few = {"ambiguity": 3, "depth": 2, "starts": 3, "elements": 8}
    train = draw(SelectivBench(**few, gap=(1, 10), noise=0.2), 2000, split="train", seed=0)
    test = draw(SelectivBench(**few, gap=(10, 10)), 300, split="test", seed=0)
    heard = train.inputs.max(axis=2) >= 1
    known = {tuple(row[here].argmax(axis=1).tolist()) for row, here in zip(train.inputs, heard, strict=True)}
    asked = {tuple(row[row != 4].tolist()) for row in test.inputs}
    assert {len(letters) for letters in known | asked} == {8}
    assert not known & asked
    assert not set(identities(train).tolist()) & set(identities(test).tolist())
