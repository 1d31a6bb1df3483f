"""Word problems of finite groups: the running product of random elements."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from delta_jax.config import check_fields
from delta_jax.data.tasks.draws import at_least
from delta_jax.data.tasks.examples import IGNORED, Examples, Split

__all__ = ["Group", "WordProblem", "group_of"]

_LARGEST = {"S": 6, "A": 6, "Z": 1000}


class Group(NamedTuple):
    """A finite group, its elements numbered from 0, the identity.

    Attributes:
        table: [g, g] int32, the product of elements a and b at [a, b].
        permutations: [g, n] what an element does to n points, in lexicographic order; (a b)(i) = a(b(i)). None for a
            cyclic group, where element a is a turns.
    """

    table: np.ndarray
    permutations: np.ndarray | None


@functools.cache
def group_of(name: str) -> Group:
    """The symmetric (S3), alternating (A5) or cyclic (Z60) group of that name.

    Raises:
        ValueError: another name, or a group too large for its table.
    """
    kind, degree = name[:1], int(name[1:]) if name[1:].isdecimal() else 0
    if not 2 <= degree <= _LARGEST.get(kind, 0):
        raise ValueError(f"group must be S2 to S6, A2 to A6 or Z2 to Z1000, got {name!r}")
    if kind == "Z":
        turns = np.arange(degree, dtype=np.int32)
        return Group((turns[:, None] + turns) % degree, None)
    elements = np.array(list(itertools.permutations(range(degree))))
    if kind == "A":
        left, right = np.triu_indices(degree, 1)
        elements = elements[(elements[:, left] > elements[:, right]).sum(axis=1) % 2 == 0]
    digits = degree ** np.arange(degree)[::-1]  # lexicographic order is the order of these numbers
    products = elements[:, elements] @ digits
    return Group(np.searchsorted(elements @ digits, products).astype(np.int32), elements)


@dataclass(frozen=True, kw_only=True)
class WordProblem:
    """The product so far of a sequence of group elements, y_t = y_(t-1) x_t, asked after every element.

    Layout: BOS, then the elements x_1 to x_n, each one token or, with `tokens_per_element` k, one token and k - 1
    fillers. y_t is asked at the last token of element t. Tokens: an element is its number in `group_of` (0 the identity),
    then BOS, then the filler. The reference code asks for BOS at BOS too; here nothing is asked there.

    A model that learns only the parity of permutations scores twice `chance`.

    Attributes:
        group: S2 to S6, A2 to A6, Z2 to Z1000; the papers use S3, S4, A5, S5 and Z60.
        elements: n, how many a sequence has. DeltaProduct trains at 128 and tests at 512; Grazzi et al. train at 32 and test
            at 500.
        swaps_only: x_t is the identity or one transposition (11 tokens of S5).
        limit_to_3: x_t moves at most three points.
        tokens_per_element: tokens a model has for each element.

    Sources: Merrill et al., The Illusion of State in State-Space Models, section 5; Grazzi et al., Unlocking
    State-Tracking in Linear RNNs Through Negative Eigenvalues, section 5.2 and appendix E.2; Siems et al., DeltaProduct,
    section 5.1.

    Examples:
        >>> examples = draw(WordProblem(group="S3", elements=8), 2, split="train", seed=0)
        >>> (examples.targets != IGNORED).sum(axis=1).tolist()  # the product after every element
        [8, 8]
    """

    group: str = "S5"
    elements: int = 128
    swaps_only: bool = False
    limit_to_3: bool = False
    tokens_per_element: int = 1

    def __post_init__(self) -> None:
        check_fields(self)
        at_least(self, elements=1, tokens_per_element=1)
        if self.swaps_only and self.limit_to_3:
            raise ValueError("swaps_only and limit_to_3 exclude each other")
        permutations = group_of(self.group).permutations
        if self.swaps_only and (permutations is None or self.group[0] != "S"):
            raise ValueError(f"swaps_only needs a symmetric group, got group={self.group!r}")
        if self.limit_to_3 and permutations is None:
            raise ValueError(f"limit_to_3 needs a group of permutations, got group={self.group!r}")

    @property
    def order(self) -> int:
        """How many elements the group has."""
        return len(group_of(self.group).table)

    @property
    def drawn_from(self) -> np.ndarray:
        """The elements that x_t is drawn from, uniformly."""
        permutations = group_of(self.group).permutations
        if permutations is None or not (self.swaps_only or self.limit_to_3):
            return np.arange(self.order)
        moved = (permutations != np.arange(permutations.shape[1])).sum(axis=1)
        return np.flatnonzero(moved <= (2 if self.swaps_only else 3))

    @property
    def bos(self) -> int:
        """The token before the first element."""
        return self.order

    @property
    def filler(self) -> int:
        """The token that follows an element where it has several."""
        return self.order + 1

    @property
    def length(self) -> int:
        """BOS and the tokens of the elements."""
        return 1 + self.tokens_per_element * self.elements

    @property
    def vocab_size(self) -> int:
        """The elements, BOS and, where there are any, the filler."""
        return self.order + (1 if self.tokens_per_element == 1 else 2)

    @property
    def chance(self) -> float:
        """Of an element drawn uniformly."""
        return 1 / self.order

    def sample(self, rng: np.random.Generator, number: int, split: Split) -> Examples:
        """See `Task.sample`."""
        table = group_of(self.group).table
        drawn = rng.choice(self.drawn_from.astype(np.int32), (number, self.elements))
        products = np.zeros((self.elements, number), np.int32)
        so_far = np.zeros(number, np.int32)
        for step in range(self.elements):
            so_far = table[so_far, drawn[:, step]]
            products[step] = so_far
        width = self.tokens_per_element
        inputs = np.full((number, self.length), self.filler, np.int32)
        targets = np.full_like(inputs, IGNORED)
        inputs[:, 0], inputs[:, 1::width], targets[:, width::width] = self.bos, drawn, products.T
        return Examples(inputs, targets)
