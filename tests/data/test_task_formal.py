"""The laws of words and expressions, and of the elements of groups."""

import itertools

import numpy as np
import pytest
from laws import assert_uniform

from delta_jax.data.tasks import BracketedArithmetic, ModularArithmetic, Parity, WordProblem
from delta_jax.data.tasks.examples import IGNORED
from delta_jax.data.tasks.groups import group_of


def sample(task, number, seed=0):
    return task.sample(np.random.default_rng(seed), number, "train")


def lengths_of(examples):
    """Tokens of every word, with the answer."""
    return (examples.inputs > 0).sum(axis=1) + 1


def test_parity_words():
    examples = sample(Parity(), 20_000)
    assert_uniform(lengths_of(examples), range(3, 41))
    assert_uniform(examples.inputs[examples.inputs > 0], [1, 2])
    assert ((examples.targets != IGNORED).sum(axis=1) == 1).all()
    assert (np.argmax(examples.targets != IGNORED, axis=1) == lengths_of(examples) - 2).all()
    assert_uniform(lengths_of(sample(Parity(lengths=(40, 256)), 20_000)), range(40, 257))


def test_parity_of_every_token_extends_the_parity_of_words():
    last, every = sample(Parity(), 200), sample(Parity(every_token=True), 200)
    np.testing.assert_array_equal(last.inputs, every.inputs)
    np.testing.assert_array_equal(every.targets != IGNORED, every.inputs > 0)
    asked = last.targets != IGNORED
    np.testing.assert_array_equal(last.targets[asked], every.targets[asked])


def test_chains_of_digits():
    examples = sample(ModularArithmetic(), 20_000)
    assert_uniform(lengths_of(examples), range(3, 40, 2))
    even, odd = examples.inputs[:, 0::2], examples.inputs[:, 1::2]
    assert_uniform(even[even > 0], range(5, 10))
    assert_uniform(odd[(odd > 0) & (odd != 4)], [1, 2, 3])
    np.testing.assert_array_equal(examples.targets != IGNORED, examples.inputs == 4)
    assert (examples.inputs[np.arange(20_000), lengths_of(examples) - 2] == 4).all()


def test_precedence_by_hand():
    tokens, rng = {}, np.random.default_rng(0)
    examples = ModularArithmetic(lengths=(7, 7)).sample(rng, 5000, "train")
    for row, target in zip(examples.inputs, examples.targets, strict=True):
        tokens[tuple(row[:5])] = target[5] - 5
    assert tokens[(7, 1, 8, 3, 9)] == (2 + 3 * 4) % 5
    assert tokens[(7, 3, 8, 2, 9)] == (2 * 3 - 4) % 5
    assert tokens[(5, 2, 6, 3, 6)] == 4


def parts_of(text):
    """Lengths of the left parts of every `(left op right)` of an expression, by the length of the whole."""
    if len(text) < 5:
        shapes = {1: "d", 2: "-d", 3: "(d)", 4: "(-d)"}
        assert text == shapes[len(text)]
        return []
    assert text[0] == "(" and text[-1] == ")"
    depth = 0
    for place in range(2, len(text) - 1):  # a sign right after the bracket is unary
        depth = text[1:place].count("(") - text[1:place].count(")")
        if depth == 0 and text[place] in "+-*":
            left, right = text[1:place], text[place + 1 : -1]
            return [(len(text), len(left), text[place]), *parts_of(left), *parts_of(right)]
    raise AssertionError(text)


@pytest.mark.parametrize(("multiplication", "signs"), [(False, "+-"), (True, "+-*")])
def test_bracketed_expressions(multiplication, signs):
    examples = sample(BracketedArithmetic(multiplication=multiplication), 6000)
    assert_uniform(lengths_of(examples), range(3, 41))
    assert_uniform(examples.inputs[(examples.inputs >= 5) & (examples.inputs < 10)], range(5, 10))
    parts = []
    for row in examples.inputs:
        parts += parts_of("".join(" +-*=ddddd()"[token] for token in row).split("=")[0])
    for whole in (5, 6, 9, 14):
        assert_uniform(np.array([left for size, left, _ in parts if size == whole]), range(1, whole - 3))
    assert_uniform(np.array([signs.index(sign) for *_, sign in parts]), range(len(signs)))
    assert ((examples.targets != IGNORED) == (examples.inputs == 4)).all()


@pytest.mark.parametrize(("name", "order"), [("S3", 6), ("S4", 24), ("A4", 12), ("A5", 60), ("S5", 120), ("Z60", 60)])
def test_group_axioms(name, order):
    table, permutations = group_of(name)
    assert table.shape == (order, order)
    np.testing.assert_array_equal(table[0], np.arange(order))
    np.testing.assert_array_equal(table[:, 0], np.arange(order))
    for lines in (table, table.T):
        assert (np.sort(lines, axis=1) == np.arange(order)).all()
    a, b, c = np.random.default_rng(0).integers(0, order, (3, 1000))
    np.testing.assert_array_equal(table[table[a, b], c], table[a, table[b, c]])
    assert (table == table.T).all() == (name[0] == "Z")
    if permutations is not None:
        assert len(set(map(tuple, permutations))) == order
        np.testing.assert_array_equal(permutations[table[3, 5]], permutations[3][permutations[5]])


def test_parity_is_a_homomorphism_of_words():
    task = WordProblem(group="S3", elements=30)
    examples = sample(task, 4000)
    odd = np.array([sum(a > b for a, b in itertools.combinations(p, 2)) % 2 for p in itertools.permutations(range(3))])
    parities = np.cumsum(odd[examples.inputs[:, 1:]], axis=1) % 2
    np.testing.assert_array_equal(parities, odd[examples.targets[:, 1:]])


@pytest.mark.parametrize(
    ("options", "count", "moved"),
    [
        ({"group": "S5", "swaps_only": True}, 11, {0, 2}),
        ({"group": "S3", "swaps_only": True}, 4, {0, 2}),
        ({"group": "S5", "limit_to_3": True}, 31, {0, 2, 3}),
        ({"group": "A5", "limit_to_3": True}, 21, {0, 3}),
        ({"group": "S4"}, 24, {0, 2, 3, 4}),
        ({"group": "Z60"}, 60, None),
    ],
)
def test_elements_are_uniform_over_those_allowed(options, count, moved):
    task = WordProblem(**options, elements=40)
    examples = sample(task, 2000)
    assert len(task.drawn_from) == count and task.drawn_from[0] == 0
    assert (examples.inputs[:, 0] == task.bos).all() and (examples.targets[:, 0] == IGNORED).all()
    assert_uniform(examples.inputs[:, 1:], task.drawn_from)
    if moved is not None:
        permutations = group_of(task.group).permutations[task.drawn_from]
        assert set((permutations != np.arange(permutations.shape[1])).sum(axis=1).tolist()) == moved


def test_products_of_all_elements_are_uniform():
    assert_uniform(sample(WordProblem(group="A5", elements=20), 3000).targets[:, -1], range(60))


def test_several_tokens_per_element():
    one, four = (sample(WordProblem(group="A5", elements=6, tokens_per_element=width), 50) for width in (1, 4))
    assert four.inputs.shape == (50, 25)
    np.testing.assert_array_equal(four.inputs[:, 1::4], one.inputs[:, 1:])
    np.testing.assert_array_equal(four.targets[:, 4::4], one.targets[:, 1:])
    for column in range(25):
        assert (four.inputs[:, column] == 61).all() == (column % 4 != 1 and column > 0)
        assert (four.targets[:, column] == IGNORED).all() == (column % 4 != 0 or column == 0)
