"""What holds for every task of state tracking: an oracle is right, a guess is by chance, splits are disjoint."""

import itertools

import numpy as np
import pytest

from delta_jax.data.tasks import (
    BracketedArithmetic,
    GraphConnectivity,
    MatrixProducts,
    ModularArithmetic,
    Parity,
    RegBench,
    SelectivBench,
    WordProblem,
)
from delta_jax.data.tasks.examples import IGNORED, draw, identities
from delta_jax.data.tasks.scores import right, sequence_accuracy, token_accuracy


def parity(task, tokens):
    return [1 + sum(token == 2 for token in tokens[: t + 1]) % 2 for t in range(len(tokens))]


def arithmetic(task, tokens):
    signs = ["", "+", "-", "*", "="] + [str(digit) for digit in range(task.modulus)] + ["(", ")"]
    expression = "".join(signs[token] for token in tokens).split("=")[0]
    return [5 + eval(expression) % task.modulus] * len(tokens)


def word_problem(task, tokens):
    degree = int(task.group[1:])
    if task.group[0] == "Z":
        elements = list(range(degree))
        multiply, so_far = lambda a, b: (a + b) % degree, 0
    else:
        elements = list(itertools.permutations(range(degree)))
        if task.group[0] == "A":
            swaps = [sum(a > b for a, b in itertools.combinations(element, 2)) for element in elements]
            elements = [element for element, count in zip(elements, swaps, strict=True) if count % 2 == 0]
        multiply, so_far = lambda a, b: tuple(a[i] for i in b), tuple(range(degree))
    number, answers = {element: index for index, element in enumerate(elements)}, []
    for token in tokens:
        if token < len(elements):
            so_far = multiply(so_far, elements[token])
        answers.append(number[so_far])
    return answers


def selective(task, frames):
    letters = frames if frames.ndim == 1 else np.where(frames.max(axis=1) >= 1, frames.argmax(axis=1), task.blank)
    successor = task.grammar.successor
    state, answers = len(successor) - 1, []
    for letter in letters:
        if letter != task.blank and successor[state, letter] >= 0:
            state = successor[state, letter]
        answers.append(state)
    return answers


def graph(task, tokens):
    here, goal = tokens[0], tokens[1]
    reached = False
    for start, end in zip(tokens[2:-1:2], tokens[3:-1:2], strict=True):
        if start == here:
            here = end
            reached = reached or here == goal
    return [3 if reached else 2] * len(tokens)


def matrix(task, tokens):
    product, answers = np.eye(3, dtype=object), []
    for start in range(0, len(tokens), 9):
        product = product @ np.reshape(tokens[start : start + 9], (3, 3)).astype(object) % task.modulus
        answers += [product[0, 0]] * 9
    return answers


SMALL_GRAMMAR = {"ambiguity": 6, "depth": 4, "elements": 30}
# A task, an oracle (of RegBench in its own file: it has to know the automaton), the answers possible at all.
CASES = {
    "parity": (Parity(), parity, [1, 2]),
    "parity, every token": (Parity(every_token=True), parity, [1, 2]),
    "parity, long": (Parity(lengths=(40, 256)), parity, [1, 2]),
    "arithmetic": (ModularArithmetic(), arithmetic, range(5, 10)),
    "arithmetic mod 3": (ModularArithmetic(modulus=3, lengths=(4, 30)), arithmetic, range(5, 8)),
    "brackets": (BracketedArithmetic(), arithmetic, range(5, 10)),
    "brackets, long": (BracketedArithmetic(lengths=(40, 256)), arithmetic, range(5, 10)),
    "brackets and *": (BracketedArithmetic(multiplication=True), arithmetic, range(5, 10)),
    "S3": (WordProblem(group="S3", elements=20), word_problem, range(6)),
    "S4": (WordProblem(group="S4", elements=20), word_problem, range(24)),
    "A5": (WordProblem(group="A5", elements=20), word_problem, range(60)),
    "A5, 3-cycles": (WordProblem(group="A5", elements=20, limit_to_3=True), word_problem, range(60)),
    "S5": (WordProblem(group="S5", elements=20), word_problem, range(120)),
    "S5, swaps": (WordProblem(group="S5", elements=20, swaps_only=True), word_problem, range(120)),
    "S5, up to 3": (WordProblem(group="S5", elements=20, limit_to_3=True), word_problem, range(120)),
    "S5, 4 tokens": (WordProblem(group="S5", elements=10, tokens_per_element=4), word_problem, range(120)),
    "Z60": (WordProblem(group="Z60", elements=20), word_problem, range(60)),
    "RegBench": (RegBench(), None, range(2, 20)),
    "complexity": (SelectivBench(**SMALL_GRAMMAR), selective, range(25)),
    "gaps and noise": (SelectivBench(**SMALL_GRAMMAR, gap=(1, 10), noise=0.2), selective, range(25)),
    "distractors": (
        SelectivBench(**SMALL_GRAMMAR, gap=(0, 2), distractors=0.3, distractors_from=5),
        selective,
        range(25),
    ),
    "graph": (GraphConnectivity(), graph, [2, 3]),
    "graph, short": (GraphConnectivity(edges=(1, 4), span=1, names=6), graph, [2, 3]),
    "matrices": (MatrixProducts(matrices=12), matrix, range(2)),
    "matrices mod 6": (MatrixProducts(matrices=6, modulus=6), matrix, range(6)),
    "any matrices": (MatrixProducts(matrices=6, modulus=5, invertible=False), matrix, range(5)),
}
each = pytest.mark.parametrize(("task", "oracle", "possible"), CASES.values(), ids=CASES)


@each
def test_an_oracle_is_always_right(task, oracle, possible):
    if oracle is None:
        pytest.skip("needs the automaton")
    examples = draw(task, 60, split="test", seed=1)
    predictions = np.array([oracle(task, row) for row in examples.inputs])
    hits = right(examples, predictions)
    assert token_accuracy(hits) == sequence_accuracy(hits) == 1.0
    broken = np.where(np.arange(hits.shape[1]) < hits.shape[1] // 2, predictions, np.roll(possible, 1)[0])
    assert token_accuracy(right(examples, broken)) < 1.0


@each
def test_a_guess_is_right_by_chance(task, oracle, possible):
    number = 600 if examples_are_large(task) else 5000
    examples = draw(task, number, split="train", seed=2)
    guesses = np.random.default_rng(0).choice(possible, examples.targets.shape)
    per_sequence = np.nanmean(right(examples, guesses), axis=1)
    error = 4 * per_sequence.std() / np.sqrt(number)
    tolerance = error + (0.002 if isinstance(task, RegBench) else 0)  # see its `chance`
    assert error < 0.1 * task.chance + 0.01
    assert abs(per_sequence.mean() - task.chance) < tolerance


def examples_are_large(task):
    return isinstance(task, RegBench) or getattr(task, "noise", 0) > 0


@each
def test_shapes_dtypes_and_ids(task, oracle, possible):
    examples = draw(task, 40, split="train", seed=3)
    assert examples.inputs.shape[:2] == examples.targets.shape == (40, task.length)
    assert examples.targets.dtype == np.int32
    assert examples.inputs.dtype == (np.float32 if examples.inputs.ndim == 3 else np.int32)
    if examples.inputs.ndim == 2:
        assert examples.inputs.min() >= 0 and examples.inputs.max() < task.vocab_size
    asked = examples.targets != IGNORED
    assert asked.any(axis=1).all()
    assert set(np.unique(examples.targets[asked])) <= set(possible) and max(possible) < task.vocab_size


@each
def test_the_same_seed_gives_the_same_bits(task, oracle, possible):
    first, again, other = (draw(task, 20, split="test", seed=seed) for seed in (5, 5, 6))
    for a, b in zip(first, again, strict=True):
        assert (a is None and b is None) or (a.dtype == b.dtype and np.array_equal(a, b))
    assert not np.array_equal(first.inputs, other.inputs)


# Tasks with so few sequences that train sets of two seeds are certain to meet.
TINY = [
    Parity(lengths=(3, 11)),
    ModularArithmetic(lengths=(3, 7), modulus=3),
    BracketedArithmetic(lengths=(3, 9), modulus=3),
    WordProblem(group="S3", elements=4),
    WordProblem(group="S5", elements=3, swaps_only=True, tokens_per_element=2),
    SelectivBench(ambiguity=3, depth=2, starts=3, elements=10),
    GraphConnectivity(edges=(2, 4), span=2, names=7),
    MatrixProducts(matrices=1, modulus=3),
]


@pytest.mark.parametrize("task", TINY, ids=lambda task: type(task).__name__)
def test_train_and_test_never_share_a_sequence(task):
    train, other = (draw(task, 3000, split="train", seed=seed) for seed in (0, 1))
    test = draw(task, 300, split="test", seed=0)
    assert rows(train) & rows(other)
    assert not rows(train) & rows(test)
    assert not set(identities(train).tolist()) & set(identities(test).tolist())


def rows(examples):
    return {row.tobytes() for row in examples.inputs}


def test_train_and_test_never_share_an_automaton():
    task = RegBench(letters=2, states=(2, 3), symbols=(1, 2), edges=(1, 1), strings=(2, 3), string_length=(30, 40))
    train, other = (set(identities(draw(task, 900, split="train", seed=seed)).tolist()) for seed in (0, 1))
    assert train & other
    train, test = draw(RegBench(), 300, split="train", seed=0), draw(RegBench(), 300, split="test", seed=0)
    assert not rows(train) & rows(test)
    assert not set(identities(train).tolist()) & set(identities(test).tolist())


def test_words_belong_to_one_split_whatever_the_longest():
    short = draw(Parity(lengths=(3, 9)), 2000, split="train", seed=0)
    long = draw(Parity(lengths=(3, 12)), 2000, split="test", seed=0)
    pad = ((0, 0), (0, long.inputs.shape[1] - short.inputs.shape[1]))
    assert not {row.tobytes() for row in np.pad(short.inputs, pad)} & rows(long)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: Parity(lengths=(1, 5)), "lengths"),
        (lambda: Parity(lengths=(9, 5)), "lengths"),
        (lambda: ModularArithmetic(lengths=(4, 4)), "lengths"),
        (lambda: ModularArithmetic(modulus=1), "modulus"),
        (lambda: BracketedArithmetic(lengths=(2, 9)), "lengths"),
        (lambda: WordProblem(group="S9"), "group"),
        (lambda: WordProblem(group="Q8"), "group"),
        (lambda: WordProblem(group=""), "group"),
        (lambda: WordProblem(elements=0), "elements"),
        (lambda: WordProblem(tokens_per_element=0), "tokens_per_element"),
        (lambda: WordProblem(group="Z60", swaps_only=True), "swaps_only"),
        (lambda: WordProblem(group="A5", swaps_only=True), "swaps_only"),
        (lambda: WordProblem(group="Z60", limit_to_3=True), "limit_to_3"),
        (lambda: WordProblem(swaps_only=True, limit_to_3=True), "swaps_only"),
        (lambda: RegBench(letters=3), "symbols"),
        (lambda: RegBench(edges=(1, 4)), "edges"),
        (lambda: RegBench(symbols=(2, 5)), "edges"),
        (lambda: RegBench(states=(1, 5)), "states"),
        (lambda: RegBench(strings=(0, 5)), "strings"),
        (lambda: RegBench(string_length=(0, 5)), "string_length"),
        (lambda: SelectivBench(ambiguity=0), "ambiguity"),
        (lambda: SelectivBench(ambiguity=3), "starts"),
        (lambda: SelectivBench(depth=0), "depth"),
        (lambda: SelectivBench(gap=(3, 2)), "gap"),
        (lambda: SelectivBench(noise=-0.1), "noise"),
        (lambda: SelectivBench(distractors=1.5), "distractors"),
        (lambda: SelectivBench(distractors_from=-1), "distractors_from"),
        (lambda: SelectivBench(density=0.0), "density"),
        (lambda: SelectivBench(elements=0), "elements"),
        (lambda: SelectivBench(density=1e-6, ambiguity=4).grammar, "density"),
        (lambda: GraphConnectivity(edges=(0, 4)), "edges"),
        (lambda: GraphConnectivity(span=0), "span"),
        (lambda: GraphConnectivity(edges=(1, 600)), "names"),
        (lambda: MatrixProducts(matrices=0), "matrices"),
        (lambda: MatrixProducts(modulus=1), "modulus"),
    ],
)
def test_impossible_parameters_are_refused_by_name(make, name):
    with pytest.raises(ValueError) as error:
        make()
    assert name in str(error.value)
