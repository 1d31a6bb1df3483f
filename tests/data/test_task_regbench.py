"""RegBench: random automata, their languages and the strings drawn from them."""

from dataclasses import replace

import numpy as np
import pytest
from laws import assert_uniform

from delta_jax.data.tasks import RegBench
from delta_jax.data.tasks.examples import IGNORED
from delta_jax.data.tasks.regbench import Automata, language_hash
from delta_jax.data.tasks.scores import right, sequence_accuracy, token_accuracy

TASK = RegBench()
NUMBER = 1500


@pytest.fixture(scope="module")
def drawn():
    """Examples, and the automata behind them: what `sample` draws first."""
    return TASK.sample(np.random.default_rng(0), NUMBER, "train"), TASK.automata(np.random.default_rng(0), NUMBER)


def strings_of(row):
    return [part.split(" ") for part in " ".join(map(str, row[row > 0])).split(" 1 ")]


def walk(automata, index, letters):
    """States before every letter and after the last; fails on a letter that is not legal."""
    states = [0]
    for letter in letters:
        edges = automata.symbols[index, states[-1], : automata.degree[index, states[-1]]].tolist()
        states.append(int(automata.targets[index, states[-1], edges.index(int(letter) - 2)]))
    return states


def same_language(automata, one, other):
    """By all pairs of states that some string leads to."""
    pairs, seen = [(0, 0)], set()
    while pairs:
        pair = pairs.pop()
        if pair not in seen:
            seen.add(pair)
            edges = [
                dict(
                    zip(*(field[which, state, : automata.degree[which, state]] for field in automata[:2]), strict=True)
                )
                for which, state in zip((one, other), pair, strict=True)
            ]
            if edges[0].keys() != edges[1].keys():
                return False
            pairs += [(edges[0][letter], edges[1][letter]) for letter in edges[0]]
    return True


def test_automata(drawn):
    symbols, targets, degree = drawn[1]
    assert_uniform(degree, [1, 2, 3])
    assert (np.diff(np.sort(symbols, axis=-1)) > 0).all() and (np.diff(np.sort(targets, axis=-1)) > 0).all()
    assert (targets != np.arange(12)[None, :, None]).all()
    # States below 12 are the only ones reached, and of 12 possible numbers all from 4 to 12 occur.
    for states in range(4, 13):
        fixed = replace(TASK, states=(states, states)).automata(np.random.default_rng(1), 300)
        assert fixed.targets.max() == states - 1
    reached = np.where(np.arange(12)[:, None] < 4, targets, 0).max(axis=(1, 2))
    assert reached.max() == 11 and 0.05 < (reached == 3).mean() < 0.2
    for count in (4, 11, 18):
        fixed = replace(TASK, symbols=(count, count)).automata(np.random.default_rng(1), 300)
        assert max(len(np.unique(one)) for one in fixed.symbols) == count
    assert_uniform(symbols[:, 0, 0], range(18))
    assert_uniform(fixed.targets[:, 5, 0][fixed.targets[:, 5, 0] < 4], range(4))


def test_an_oracle_that_knows_the_automaton_is_always_right(drawn):
    examples, automata = drawn
    predictions = np.zeros_like(examples.targets)
    for index in range(200):
        place = 0
        for letters in strings_of(examples.inputs[index]):
            for offset, state in enumerate(walk(automata, index, letters)):
                if place + offset > 0:  # the first edge of the state: legal, and rarely the target
                    predictions[index, min(place + offset - 1, TASK.length - 1)] = automata.symbols[index, state, 0] + 2
            place += len(letters) + 1
    some = examples.take(slice(200))
    hits = right(some, predictions[:200])
    assert token_accuracy(hits) == sequence_accuracy(hits) == 1.0
    assert token_accuracy(np.where(some.targets == IGNORED, np.nan, predictions[:200] == some.targets)) < 0.7


def test_strings(drawn):
    examples, _ = drawn
    whole = [strings_of(row) for row in examples.inputs]
    counts = np.array([len(strings) for strings in whole])
    assert counts.min() == 10 and counts.max() == 19
    assert_uniform(np.array([len(string) for strings in whole for string in strings]), range(1, 50))
    lengths = (examples.inputs > 0).sum(axis=1)
    assert abs(lengths.mean() - (14.5 * 26 - 1)) < 4 * lengths.std() / np.sqrt(NUMBER) and lengths.max() <= TASK.length


def test_the_longest_sequence_fits():
    task = replace(TASK, strings=(19, 19), string_length=(49, 49))
    examples = task.sample(np.random.default_rng(0), 5, "train")
    assert task.length == TASK.length == 948 and (examples.inputs > 0).all() and (examples.targets[:, -1] > 1).all()


def test_the_number_of_strings():
    task = replace(TASK, string_length=(2, 2))
    examples = task.sample(np.random.default_rng(0), 5000, "train")
    assert_uniform((examples.inputs == 1).sum(axis=1) + 1, range(10, 20))
    assert (np.nonzero(examples.inputs == 1)[1] % 3 == 2).all()


def test_targets_are_the_next_letters_and_legal_are_the_edges(drawn):
    examples, automata = drawn
    following = examples.inputs[:, 1:]
    np.testing.assert_array_equal(examples.targets[:, :-1], np.where(following > 1, following, IGNORED))
    asked = examples.targets != IGNORED
    assert (examples.legal.any(axis=-1) == asked).all() and not examples.legal[..., :2].any()
    for index in range(50):
        place = 0
        for letters in strings_of(examples.inputs[index]):
            for offset, state in enumerate(walk(automata, index, letters)[:-1]):
                if place + offset > 0:
                    legal = np.flatnonzero(examples.legal[index, place + offset - 1]) - 2
                    edges = automata.symbols[index, state, : automata.degree[index, state]]
                    assert legal.tolist() == sorted(edges)
            place += len(letters) + 1


def test_legal_letters_are_equally_likely(drawn):
    """The target's place among the legal letters is uniform."""
    examples, _ = drawn
    asked = examples.targets != IGNORED
    legal, targets = examples.legal[asked], examples.targets[asked]
    rank = np.cumsum(legal, axis=-1)[np.arange(len(targets)), targets]
    for degree in (2, 3):
        assert_uniform(rank[legal.sum(axis=-1) == degree], range(1, degree + 1))


def test_identity_is_the_language(drawn):
    examples, automata = drawn
    np.testing.assert_array_equal(examples.identity, language_hash(automata))
    index, same = {}, []
    for place, identity in enumerate(examples.identity.tolist()):
        same += [(index.setdefault(identity, place), place)]
    same = [pair for pair in same if pair[0] != pair[1]]
    assert len(same) < 10  # single short loops do meet
    assert all(same_language(automata, *pair) for pair in same)
    assert not any(same_language(automata, place, place + 1) for place in range(200))
    order = np.random.default_rng(0).permutation(np.arange(1, 12))
    order = np.concatenate([[0], order])  # state s becomes order[s]
    renamed = Automata(*(np.empty_like(field) for field in automata))
    renamed.symbols[:, order], renamed.degree[:, order] = automata.symbols, automata.degree
    renamed.targets[:, order] = order[automata.targets]
    np.testing.assert_array_equal(language_hash(renamed), examples.identity)
    shuffled = automata._replace(symbols=np.where(automata.degree[..., None] == 2, automata.symbols[..., [1, 0, 2]], 0))
    assert (language_hash(shuffled) != examples.identity).mean() > 0.9


def test_equivalent_states_make_no_other_language():
    """a b a b ... with two states, and unrolled to four; then with another last letter."""
    degree = np.ones((1, 4), int)
    two = Automata(np.array([0, 1, 0, 0]).reshape(1, 4, 1), np.array([1, 0, 0, 0]).reshape(1, 4, 1), degree)
    four = Automata(np.array([0, 1, 0, 1]).reshape(1, 4, 1), np.array([1, 2, 3, 0]).reshape(1, 4, 1), degree)
    other = four._replace(symbols=np.array([0, 1, 0, 2]).reshape(1, 4, 1))
    assert language_hash(two) == language_hash(four) != language_hash(other)


def test_edges_that_do_not_exist_play_no_role(drawn):
    automata = drawn[1]
    exists = np.arange(3) < automata.degree[..., None]
    emptied = Automata(np.where(exists, automata.symbols, 0), np.where(exists, automata.targets, 0), automata.degree)
    np.testing.assert_array_equal(language_hash(emptied), language_hash(automata))
