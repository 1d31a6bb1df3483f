"""Connectivity of a sorted deterministic graph: follow the only path that leaves a node."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from delta_jax.config import check_fields
from delta_jax.data.tasks.draws import at_least
from delta_jax.data.tasks.examples import IGNORED, Examples, Split
from delta_jax.data.tasks.rows import Range, check_range, identity_of_padded, pick, uniform

__all__ = ["GraphConnectivity"]

_PAD, _ASK, _NO, _YES, _FIRST = range(5)


@dataclass(frozen=True, kw_only=True)
class GraphConnectivity:
    """Whether a path leads from one node to another in a graph of which no node has two edges.

    Layout: source, goal, then the edges, two tokens each, sorted so that an edge comes after all that lead to its first
    node, then a token that asks, then padding. So one pass that remembers a single node suffices. Tokens: padding 0, the
    question 1, no 2, yes 3, then the names of nodes, which every sequence draws anew.

    The first nodes in the order of the sequence have one edge each, to one of the `span` nodes behind, all equally likely.
    The source is in the first half of them. Yes and no are equally likely: a goal is a node of the path from the source,
    or else a node behind the source, with an edge to it, that is not on the path (where there is none, any other node),
    all of them equally likely. A guess that only counts the edges of the goal is right in 66 % of sequences.

    Attributes:
        edges: smallest and largest number of edges, all equally likely; the paper tests on up to 300.
        span: how far an edge leads at most, in nodes of the order.
        names: how many names of nodes there are.

    Source: the task is that of Merrill et al., Why Are Linear RNNs More Parallelizable? (arXiv 2603.03612); how graphs are
    drawn is ours.

    Examples:
        >>> examples = draw(GraphConnectivity(edges=(1, 6)), 3, split="train", seed=0)
        >>> set(examples.targets[examples.targets != IGNORED].tolist()) <= {2, 3}  # no and yes
        True
    """

    edges: Range = (1, 100)
    span: int = 4
    names: int = 512

    def __post_init__(self) -> None:
        check_fields(self)
        check_range("edges", self.edges, 1)
        at_least(self, span=1, names=self._nodes)

    @property
    def _nodes(self) -> int:
        return self.edges[1] + self.span + 1  # the last has no edges at all

    @property
    def length(self) -> int:
        """Positions of the inputs."""
        return 2 * self.edges[1] + 3

    @property
    def vocab_size(self) -> int:
        """Padding, the question, two answers, and names."""
        return _FIRST + self.names

    @property
    def chance(self) -> float:
        """Of a coin."""
        return 0.5

    def sample(self, rng: np.random.Generator, number: int, split: Split) -> Examples:
        """See `Task.sample`."""
        most, row = self.edges[1], np.arange(number)
        count = uniform(rng, self.edges, number)
        exists = np.arange(most) < count[:, None]
        target = np.arange(most) + rng.integers(1, self.span + 1, (number, most))
        source = rng.integers(0, (count + 1) // 2)
        path, pointed = np.zeros((2, number, self._nodes), bool)
        path[row, source] = True
        for node in range(most):
            path[row, target[:, node]] |= path[:, node] & exists[:, node]
        pointed[np.broadcast_to(row[:, None], target.shape)[exists], target[exists]] = True
        yes = rng.random(number) < 0.5
        known = np.arange(self._nodes) < (count + self.span)[:, None]
        behind = np.arange(self._nodes) > source[:, None]
        preference = np.where(pointed & behind, 2, np.where(known, 1, 0))
        preference[path] = -1
        best = preference == preference.max(axis=1, keepdims=True)
        path[row, source] = False
        goal = pick(rng, np.where(yes[:, None], path, best))
        names = np.argsort(rng.random((number, self.names)), axis=1)[:, : self._nodes] + _FIRST
        inputs = np.full((number, self.length), _PAD, np.int32)
        inputs[:, 0], inputs[:, 1] = names[row, source], names[row, goal]
        inputs[:, 2:-1:2] = np.where(exists, names[:, :most], _PAD)
        inputs[:, 3:-1:2] = np.where(exists, np.take_along_axis(names, target, axis=1), _PAD)
        targets = np.full_like(inputs, IGNORED)
        ask = 2 * count + 2
        inputs[row, ask], targets[row, ask] = _ASK, np.where(yes, _YES, _NO)
        return Examples(inputs, targets, identity=identity_of_padded(inputs))
