"""MQAR: oracle, chance, the law of the slots, overwritten keys, fillers; and the draws that tasks share."""

import itertools

import numpy as np
import pytest
from promises import check_promises, close

from delta_jax.data.tasks import MQAR
from delta_jax.data.tasks.draws import distinct, first_uses, one_of, successive
from delta_jax.data.tasks.examples import IGNORED

SMALL = {"vocab_size": 64, "random_non_queries": False}
TASKS = {
    "default": MQAR(),
    "blanks": MQAR(vocab_size=256, pairs=8, random_non_queries=False),
    "forgetting": MQAR(vocab_size=256, pairs=8, updates=8, random_non_queries=False),
    "some updates, fillers of their own": MQAR(vocab_size=256, pairs=8, updates=3, filler_tokens=56),
    "passes": MQAR(vocab_size=101, pairs=5, updates=2, passes=3, random_non_queries=False),
    "full": MQAR(vocab_size=8192, length=256, pairs=64),
}


def latest_value(task, row):
    context = 2 * (task.pairs + task.updates)
    values, start = {}, context * task.passes
    for key, value in zip(row[:context:2], row[1:context:2], strict=True):
        values[key] = value
    return [values.get(token, IGNORED) if place >= start else IGNORED for place, token in enumerate(row)]


@pytest.mark.parametrize("name", TASKS)
def test_promises(name):
    task = TASKS[name]
    symbols = task.vocab_size - task.filler_tokens
    # A filler can be a key where fillers are any tokens: the oracle then answers where nothing is asked.
    check_promises(task, latest_value, range(symbols // 2, symbols), all_targets=name not in ("default", "full"))


def test_slots_follow_the_power_law():
    task = MQAR(length=20, pairs=3, power=0.2, **SMALL)
    slots, number = 7, 40_000
    examples = task.sample(np.random.default_rng(0), number, "train")
    share = np.arange(1.0, slots + 1) ** -0.8
    share /= share.sum()
    where = [(examples.inputs[:, 6::2] == examples.inputs[:, [2 * query]]).argmax(axis=1) for query in range(3)]
    assert close(np.bincount(where[0], minlength=slots), share)
    # Without replacement, one after the other: p(a) p(b) / (1 - p(a)) for the first two.
    pairs = np.bincount(where[0] * slots + where[1], minlength=slots**2)
    law = [share[a] * share[b] / (1 - share[a]) * (a != b) for a, b in itertools.product(range(slots), repeat=2)]
    assert close(pairs, law)
    assert all((where[a] != where[b]).all() for a, b in itertools.combinations(range(3), 2))


def test_vocabulary_and_layout():
    examples = MQAR(length=32, pairs=6, **SMALL).sample(np.random.default_rng(1), 4000, "train")
    keys, values = examples.inputs[:, :12:2], examples.inputs[:, 1:12:2]
    assert close(np.bincount(keys.ravel(), minlength=32)[1:], np.full(31, 1 / 31))
    assert close(np.bincount(values.ravel(), minlength=64)[32:], np.full(32, 1 / 32))
    assert min(keys.min(), 1) == 1 and keys.max() == 31 and values.min() == 32
    assert all(len(set(row)) == 6 for row in keys) and all(len(set(row)) == 6 for row in values)
    rest = examples.inputs[:, 12:]
    assert (rest[:, 1::2] == 0).all() and ((rest != 0).sum(axis=1) == 6).all()
    np.testing.assert_array_equal(np.sort(rest)[:, -6:], np.sort(keys))


def test_updates_are_other_values_of_some_keys():
    examples = MQAR(length=40, pairs=6, updates=4, **SMALL).sample(np.random.default_rng(1), 4000, "train")
    keys, values = examples.inputs[:, :20:2], examples.inputs[:, 1:20:2]
    same = keys[:, 6:, None] == keys[:, None, :6]
    assert (same.sum(axis=2) == 1).all() and (same.sum(axis=1) <= 1).all()
    assert close(same[:, 0].sum(axis=0), np.full(6, 1 / 6)) and close(same[:, 3].sum(axis=0), np.full(6, 1 / 6))
    old = np.take_along_axis(values, same.argmax(axis=2), axis=1)
    assert (old != values[:, 6:]).all()
    assert close(np.bincount((values[:, 6:] - old).ravel() % 32, minlength=32)[1:], np.full(31, 1 / 31))


def test_passes_repeat_the_pairs():
    inputs = MQAR(length=40, pairs=3, updates=1, passes=3, **SMALL).sample(np.random.default_rng(1), 10, "train").inputs
    np.testing.assert_array_equal(inputs[:, :24], np.tile(inputs[:, :8], 3))


def test_fillers():
    rng = np.random.default_rng(1)
    anywhere = MQAR(length=64, pairs=2).sample(rng, 400, "train")
    rest = anywhere.inputs[:, 4:]
    assert 0.45 < (rest >= 4096).mean() < 0.55 and rest.max() > 8100 and rest.min() < 100
    own = MQAR(length=64, pairs=2, vocab_size=64, filler_tokens=10).sample(rng, 400, "train")
    fillers = own.inputs[:, 4:][own.targets[:, 4:] == IGNORED]
    assert close(np.bincount(fillers, minlength=64)[54:], np.full(10, 0.1)) and fillers.min() == 54
    assert own.inputs[:, :4].max() == 53


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"vocab_size": 256}, "random_non_queries"),
        ({"length": 63}, "length"),
        ({"length": 64, "pairs": 17}, "length must be at least 68"),
        ({"length": 64, "pairs": 8, "passes": 4}, "length"),
        ({"length": 64, "pairs": 11, "updates": 11}, "length"),
        ({"pairs": 0}, "pairs"),
        ({"updates": 5}, "updates"),
        ({"passes": 0}, "passes"),
        ({"power": 0.0}, "power"),
        ({"vocab_size": 8, "random_non_queries": False}, "vocab_size"),
        ({"filler_tokens": 8190}, "vocab_size"),
        ({"filler_tokens": -1}, "filler_tokens"),
    ],
)
def test_refusals(options, named):
    with pytest.raises(ValueError) as error:
        MQAR(**options)
    assert named in str(error.value)


@pytest.mark.parametrize(("choices", "size"), [(5, 2), (4, 4), (3, 1)])
def test_distinct_rows_are_equally_likely(choices, size):
    rows = distinct(np.random.default_rng(0), 30_000, choices, size)
    kinds, counts = np.unique(rows, axis=0, return_counts=True)
    assert sorted(map(tuple, kinds)) == list(itertools.permutations(range(choices), size))
    assert close(counts, np.full(len(counts), 1 / len(counts)))


def test_first_uses_and_choices_among_some():
    rng = np.random.default_rng(0)
    names = rng.integers(0, 6, (50, 9))
    assert first_uses(names).tolist() == [[row.index(name) for name in row] for row in names.tolist()]
    allowed = np.tile(np.array([True, False, True, False, True]), (6000, 1))
    assert close(np.bincount(one_of(rng, allowed), minlength=5), np.array([1, 0, 1, 0, 1]) / 3)
    assert sorted(successive(rng, 1, np.ones(4), 4)[0]) == [0, 1, 2, 3]


def test_successive_draws_among_many():
    weights = np.arange(1.0, 2001) ** -0.99
    drawn = successive(np.random.default_rng(0), 4000, weights, 100)
    share = weights[:10] / weights.sum()
    counts = np.bincount(drawn[:, 0], minlength=2000)[:10]
    assert close([*counts, 4000 - counts.sum()], [*share, 1 - share.sum()])
    assert (np.diff(np.sort(drawn, axis=1), axis=1) > 0).all()
