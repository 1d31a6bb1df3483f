"""RegBench: a random regular language in every sequence, to be learnt from its context."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from delta_jax.config import check_fields
from delta_jax.data.tasks.draws import at_least
from delta_jax.data.tasks.examples import IGNORED, Examples, Split
from delta_jax.data.tasks.rows import Range, check_range, distinct, mix, uniform

__all__ = ["Automata", "RegBench", "language_hash"]

_PAD, _SEPARATOR, _FIRST = range(3)


class Automata(NamedTuple):
    """Automata whose states are all accepting; each starts in state 0.

    Attributes:
        symbols: [n, states, edges] the letter of an edge, all different at one state.
        targets: [n, states, edges] where an edge leads to.
        degree: [n, states] how many of the edges exist, the first ones.
    """

    symbols: np.ndarray
    targets: np.ndarray
    degree: np.ndarray


@dataclass(frozen=True, kw_only=True)
class RegBench:
    """Next-letter prediction on strings of one random automaton per sequence; every legal letter is right.

    Layout: strings joined by a separator, then padding. A string starts in state 0, and each of its letters is drawn
    uniformly from the edges that leave the state. What is asked is the next letter, nothing where a separator or padding
    comes next; `Examples.legal` has the letters the automaton allows there, and they are equally likely. Tokens: padding 0,
    separator 1, then the letters.

    The benchmark minimises an automaton before it draws from it. As every state accepts and edges are equally likely,
    strings and legal letters have the same distribution without. What identifies a sequence is its language
    (`language_hash`), so that no automaton is in both splits, under no other numbering of its states either.

    Attributes:
        letters: size of the alphabet.
        states: smallest and largest number of states, before minimisation.
        symbols: smallest and largest number of letters an automaton uses.
        edges: smallest and largest number of edges leaving a state, to different other states.
        strings: smallest and largest number of strings in a sequence.
        string_length: smallest and largest length of a string, in letters.

    Source: Akyürek et al., In-Context Language Learning: Architectures and Algorithms, section 3.

    Examples:
        >>> task = RegBench(letters=6, states=(3, 4), symbols=(3, 4), edges=(1, 2))
        >>> examples = draw(task, 2, split="train", seed=0)
        >>> examples.legal.shape == (*examples.inputs.shape, 8)
        True
    """

    letters: int = 18
    states: Range = (4, 12)
    symbols: Range = (4, 18)
    edges: Range = (1, 3)
    strings: Range = (10, 19)
    string_length: Range = (1, 49)

    def __post_init__(self) -> None:
        check_fields(self)
        at_least(self, letters=1)
        check_range("symbols", self.symbols, 1, self.letters)
        check_range("states", self.states, 2)
        check_range("edges", self.edges, 1, min(self.states[0] - 1, self.symbols[0]))
        check_range("strings", self.strings, 1)
        check_range("string_length", self.string_length, 1)

    @property
    def length(self) -> int:
        """Positions of the inputs: the longest sequence less its last letter."""
        return self.strings[1] * (self.string_length[1] + 1) - 2

    @property
    def vocab_size(self) -> int:
        """Padding, separator and letters."""
        return _FIRST + self.letters

    @property
    def chance(self) -> float:
        """Of a letter drawn uniformly: edges per state over letters (what is measured is 0.110, not 0.111)."""
        return sum(self.edges) / 2 / self.letters

    def automata(self, rng: np.random.Generator, number: int) -> Automata:
        """Random automata, the first thing that `sample` draws."""
        most, edges = self.states[1], self.edges[1]
        states = uniform(rng, self.states, number)[:, None, None]
        alphabet = rng.permuted(np.tile(np.arange(self.letters), (number, 1)), axis=1)
        used = np.arange(self.letters) < uniform(rng, self.symbols, number)[:, None, None]
        place = distinct(rng, np.broadcast_to(used, (number, most, self.letters)), edges)
        symbols = np.take_along_axis(alphabet[:, None], place, axis=-1)
        others = (np.arange(most) < states) & ~np.eye(most, dtype=bool)
        return Automata(symbols, distinct(rng, others, edges), uniform(rng, self.edges, (number, most)))

    def sample(self, rng: np.random.Generator, number: int, split: Split) -> Examples:
        """See `Task.sample`."""
        automata = self.automata(rng, number)
        count = uniform(rng, self.strings, number)[:, None]
        sizes = uniform(rng, self.string_length, (number, self.strings[1]))
        sizes[np.arange(self.strings[1]) >= count] = 0
        first = np.cumsum(sizes + 1, axis=1) - sizes - 1
        row = np.arange(number)[:, None]
        # One place more than the inputs have, and a last one for what is not there.
        tokens = np.full((number, self.length + 2), _PAD, np.int32)
        state_at = np.zeros_like(tokens)
        tokens[row, np.where(sizes > 0, first - 1, -1)] = _SEPARATOR
        state = np.zeros_like(sizes)
        for index in range(self.string_length[1]):
            place = np.where(index < sizes, first + index, -1)
            edge = (rng.random(state.shape) * automata.degree[row, state]).astype(np.int64)
            tokens[row, place] = automata.symbols[row, state, edge] + _FIRST
            state_at[row, place] = state
            state = automata.targets[row, state, edge]
        tokens, state_at = tokens[:, :-1], state_at[:, :-1]
        allowed = np.zeros((number, self.states[1], self.vocab_size), bool)
        for edge_index in range(self.edges[1]):
            here = np.nonzero(edge_index < automata.degree)
            allowed[(*here, automata.symbols[(*here, edge_index)] + _FIRST)] = True
        targets = np.where(tokens >= _FIRST, tokens, np.int32(IGNORED))[:, 1:]
        legal = allowed[row, state_at[:, 1:]] & (targets != IGNORED)[..., None]
        return Examples(tokens[:, :-1], targets, legal, identity=language_hash(automata))


def language_hash(automata: Automata) -> np.ndarray:
    """[n] uint64: equal for automata with the same language, else different but for collisions.

    After r rounds a state's hash is one of the strings of up to r letters that can be read from it. Two automata of n
    states with different languages differ in a string of fewer than 2 n letters (Moore), so 2 n rounds decide.
    """
    number, states, edges = automata.symbols.shape
    exists = np.arange(edges) < automata.degree[..., None]
    letter = mix(automata.symbols.astype(np.uint64) + np.uint64(1))
    hashed = np.ones((number, states), np.uint64)
    for _ in range(2 * states):
        behind = hashed[np.arange(number)[:, None, None], automata.targets]
        with np.errstate(over="ignore"):
            hashed = mix(np.sum(mix(behind ^ letter), axis=-1, where=exists, dtype=np.uint64))
    return hashed[:, 0]
