"""Graphs and matrices: how they are drawn."""

import numpy as np
import pytest
from laws import assert_uniform

from delta_jax.data.tasks import GraphConnectivity, MatrixProducts
from delta_jax.data.tasks.examples import IGNORED


@pytest.fixture(scope="module")
def graphs():
    return GraphConnectivity().sample(np.random.default_rng(0), 8000, "train")


def test_graphs_are_sorted_and_deterministic(graphs):
    for row in graphs.inputs[:300]:
        count = int((row > 0).sum() - 3) // 2
        first, second = row[2 : 2 + 2 * count : 2].tolist(), row[3 : 3 + 2 * count : 2].tolist()
        assert (
            row[2 * count + 2] == 1 and not row[2 * count + 3 :].any() and min(first + second + [row[0], row[1]]) >= 4
        )
        assert len(set(first)) == count
        place = {node: index for index, node in enumerate(first)}
        steps = [place[end] - index for index, end in enumerate(second) if end in place]
        assert all(1 <= step <= 4 for step in steps)
        assert place[row[0]] <= (count - 1) // 2


def test_laws_of_graphs(graphs):
    counts = ((graphs.inputs > 0).sum(axis=1) - 3) // 2
    assert_uniform(counts, range(1, 101))
    answers = graphs.targets[graphs.targets != IGNORED]
    assert len(answers) == 8000
    assert_uniform(answers, [2, 3])
    assert ((graphs.targets != IGNORED) == (graphs.inputs == 1)).all()
    assert_uniform(graphs.inputs[:, 0], range(4, 516))
    long = GraphConnectivity(edges=(40, 40)).sample(np.random.default_rng(0), 8000, "train")
    first, second = long.inputs[:, 2:-1:2], long.inputs[:, 3:-1:2]
    steps = np.stack([second[:, :36] == np.roll(first, -step, axis=1)[:, :36] for step in range(1, 5)])
    assert_uniform(steps.argmax(axis=0), range(4)) if steps.any(axis=0).all() else pytest.fail("an edge leads farther")
    assert_uniform((long.inputs[:, :1] == first).argmax(axis=1), range(20))


def test_a_graph_has_no_cheap_answer():
    """Edges that lead to the goal, edges that leave it and its place say little."""
    graphs = GraphConnectivity(edges=(40, 40)).sample(np.random.default_rng(0), 8000, "train")
    goal, yes = graphs.inputs[:, 1:2], (graphs.targets == 3).any(axis=1)
    incoming = (graphs.inputs[:, 3:-1:2] == goal).sum(axis=1)
    assert incoming.min() > 0
    leaving = (graphs.inputs[:, 2:-1:2] == goal).sum(axis=1)
    place = (graphs.inputs[:, 2:] == goal).argmax(axis=1) // 8
    for rule, most in ((incoming * 2 + leaving, 0.68), (place, 0.57)):
        share = sum(max(yes[rule == value].sum(), (~yes)[rule == value].sum()) for value in np.unique(rule)) / 8000
        assert share < most


@pytest.mark.parametrize("modulus", [2, 4, 5])
def test_matrices_have_inverses(modulus):
    inputs = MatrixProducts(matrices=4, modulus=modulus).sample(np.random.default_rng(0), 3000, "train").inputs
    determinants = np.round(np.linalg.det(inputs.reshape(-1, 3, 3).astype(float))).astype(int)
    assert (np.gcd(determinants, modulus) == 1).all()
    if modulus == 2:
        codes = inputs.reshape(-1, 9) @ (1 << np.arange(9))
        assert_uniform(codes, np.unique(codes)) if len(np.unique(codes)) == 168 else pytest.fail("GL(3, 2) has 168")


def test_answers_of_products_stay_alive_only_if_invertible():
    invertible = MatrixProducts(matrices=40).sample(np.random.default_rng(0), 3000, "train")
    answers = invertible.targets[:, 8::9]
    assert (invertible.targets != IGNORED).sum() == answers.size and (answers != IGNORED).all()
    assert abs((answers[:, 20:] == 1).mean() - 4 / 7) < 0.01
    any_matrix = MatrixProducts(matrices=40, invertible=False).sample(np.random.default_rng(0), 3000, "train")
    assert_uniform(any_matrix.inputs, [0, 1])
    assert (any_matrix.targets[:, -1] == 1).mean() < 0.01
