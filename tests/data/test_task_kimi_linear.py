"""Palindrome, multi-query recall and stacks: oracles, chance, layouts and frequencies."""

import numpy as np
import pytest
from promises import check_promises, close

from delta_jax.data.tasks import MultiQueryRecall, Palindrome, Stacks
from delta_jax.data.tasks.examples import IGNORED, draw


def mirror(task, row):
    tokens = list(row[: list(row).index(0)])
    return [IGNORED] * (len(tokens) + 1) + tokens[-2::-1]


def lookup(task, row):
    separator = list(row).index(0)
    values = dict(zip(row[:separator:2], row[1:separator:2], strict=True))
    return [IGNORED] * (separator + 1) + [values[query] for query in row[separator + 1 :]]


def machine(task, row):
    stacks, answers = {}, []
    for operation, stack, element in row.reshape(-1, 3):
        if operation == 0:
            stacks.setdefault(stack, []).append(element)
        answers += [IGNORED, stacks[stack].pop() if operation else IGNORED, IGNORED]
    return answers


@pytest.mark.parametrize(
    ("task", "oracle", "guesses"),
    [
        (Palindrome(), mirror, range(1, 128)),
        (Palindrome(length=34, vocab_size=17), mirror, range(1, 17)),
        (MultiQueryRecall(), lookup, range(1024, 2048)),
        (MultiQueryRecall(pairs=8, queries=3, vocab_size=33), lookup, range(16, 33)),
        (Stacks(), machine, range(66, 130)),
        (Stacks(operations=32, stacks=8, elements=10, pops=0.7), machine, range(10, 20)),
        (Stacks(operations=12, stacks=20), machine, range(22, 86)),
    ],
    ids=lambda value: getattr(value, "__name__", repr(value)),
)
def test_promises(task, oracle, guesses):
    check_promises(task, oracle, guesses)


def test_palindromes_give_their_first_token_away():
    examples = draw(Palindrome(length=20, vocab_size=11), 3000, split="train", seed=0)
    assert (examples.inputs[:, 10] == 0).all()
    np.testing.assert_array_equal(examples.inputs[:, 11:], examples.inputs[:, 9:0:-1])
    assert ((examples.targets != IGNORED).sum(axis=1) == 9).all() and (examples.targets[:, :11] == IGNORED).all()
    assert close(np.bincount(examples.inputs[:, :10].ravel(), minlength=11)[1:], np.full(10, 0.1))


def test_queries_are_different_keys_in_random_order():
    examples = draw(MultiQueryRecall(pairs=6, queries=4, vocab_size=20), 5000, split="train", seed=0)
    keys, values, queries = examples.inputs[:, :12:2], examples.inputs[:, 1:12:2], examples.inputs[:, 13:]
    assert all(len(set(row)) == 6 for row in keys) and all(len(set(row)) == 4 for row in queries)
    asked = (queries[:, :, None] == keys[:, None, :]).sum(axis=0)
    assert all(close(counts, np.full(6, 1 / 6)) for counts in asked)
    assert close(np.bincount(keys.ravel(), minlength=10)[1:], np.full(9, 1 / 9))
    assert close(np.bincount(values.ravel(), minlength=20)[10:], np.full(10, 0.1))


def test_operations():
    task = Stacks(operations=30, stacks=5, elements=7, pops=0.6)
    examples = draw(task, 3000, split="train", seed=0)
    operation, stack, element = np.moveaxis(examples.inputs.reshape(-1, 30, 3), 2, 0)
    height = np.zeros((3000, 5), int)
    rows, popped = np.arange(3000), [0, 0]
    for step in range(30):
        full = height[rows, stack[:, step] - 2] > 0
        assert not operation[~full, step].any()
        if step < 29:
            popped = np.add(popped, [operation[full, step].sum(), full.sum()])
        else:
            assert operation[height.any(axis=1), step].all()
        height[rows, stack[:, step] - 2] += 1 - 2 * operation[:, step]
    assert close([popped[0], popped[1] - popped[0]], [0.6, 0.4])
    assert close(np.bincount(stack[:, :29].ravel(), minlength=7)[2:], np.full(5, 0.2))
    assert close(np.bincount(element[operation == 0], minlength=14)[7:], np.full(7, 1 / 7))
    np.testing.assert_array_equal(examples.targets.reshape(-1, 30, 3)[..., 1] != IGNORED, operation == 1)


@pytest.mark.parametrize(
    ("kind", "options", "named"),
    [
        (Palindrome, {"length": 255}, "length"),
        (Palindrome, {"length": 2}, "length"),
        (Palindrome, {"vocab_size": 2}, "vocab_size"),
        (MultiQueryRecall, {"queries": 86}, "queries"),
        (MultiQueryRecall, {"pairs": 1024}, "vocab_size must be at least 2 * pairs + 2 = 2050"),
        (MultiQueryRecall, {"queries": 0}, "queries"),
        (Stacks, {"operations": 1}, "operations"),
        (Stacks, {"stacks": 0}, "stacks"),
        (Stacks, {"elements": 1}, "elements"),
        (Stacks, {"pops": 0.0}, "pops"),
        (Stacks, {"pops": 1.1}, "pops"),
    ],
)
def test_refusals(kind, options, named):
    with pytest.raises(ValueError) as error:
        kind(**options)
    assert named in str(error.value)
