"""SelectivBench: the hidden state of a random grammar from ambiguous letters, through gaps, noise and distractors."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from delta_jax.config import check_fields
from delta_jax.data.tasks.draws import at_least
from delta_jax.data.tasks.examples import IGNORED, Examples, Split, hash_rows
from delta_jax.data.tasks.rows import Range, check_range, pick, uniform

__all__ = ["Grammar", "SelectivBench", "random_grammar"]

_ATTEMPTS = 10_000


class Grammar(NamedTuple):
    """A random grammar; state s has the letter s // depth, the last state is the end of a string.

    Attributes:
        successor: [states + 1, letters + 1] the state that a letter leads to, -1 where it is not grammatical; the last
            letter is the end, and from the end it is the start states that follow.
        reach: [longest + 1, states + 1] the probability that a string in this state ends within so many letters.
    """

    successor: np.ndarray
    reach: np.ndarray


@functools.lru_cache(maxsize=8)
def random_grammar(letters: int, depth: int, density: float, starts: int, longest: int, seed: int) -> Grammar:
    """A grammar from which every state can reach the end in at most `longest` letters.

    Each state has an edge to one random state of each letter with probability `density`, to the end with probability
    `density / depth`; edges of a state are equally likely.

    Raises:
        ValueError: there was none among many drawn.
    """
    rng = np.random.default_rng(seed)
    states = letters * depth
    for _ in range(_ATTEMPTS):
        successor = np.full((states + 1, letters + 1), -1, np.int64)
        chosen = np.arange(letters) * depth + rng.integers(0, depth, (states, letters))
        successor[:-1, :-1] = np.where(rng.random((states, letters)) < density, chosen, -1)
        successor[:-1, -1] = np.where(rng.random(states) < density / depth, states, -1)
        first = rng.permutation(letters)[:starts]
        successor[-1, first] = first * depth + rng.integers(0, depth, starts)
        edges = successor[:-1] >= 0
        if not edges.any(axis=1).all():
            continue
        reach = np.zeros((longest + 1, states + 1))
        reach[:, -1] = 1
        for size in range(longest):
            ends = np.where(edges, reach[size, successor[:-1]], 0)
            reach[size + 1, :-1] = ends.sum(axis=1) / edges.sum(axis=1)
        if reach[-1].all():
            return Grammar(successor, reach)
    raise ValueError(
        f"density={density} with ambiguity={letters} and depth={depth}: no grammar of {_ATTEMPTS} drawn lets every state "
        f"reach the end of a string"
    )


@dataclass(frozen=True, kw_only=True)
class SelectivBench:
    """Name the hidden state of a grammar at every element, when a letter alone leaves `depth` states possible.

    Layout: elements, each a frame with its letter and then a gap of blank frames, padding behind the last. An element is
    a letter, the end of a string, or a distractor; strings follow each other and the last is cut. The state (of the
    start, one of four) goes on from letter to letter: the target of all frames of an element is the number of its state,
    and they vote together (`Examples.answers` is the number of the element). Nothing is asked in the frames of a
    distractor, a letter that the grammar does not allow there and that leaves the state as it is.

    Without noise inputs are tokens: letter a is a, the end of a string `ambiguity`, then the blank. With noise they are
    weights [n, T, ambiguity + 1] float32 of those tokens but the blank and all later ones, whose weight is zero; a blank
    frame is zero, and every frame has uniform noise.

    A string has at most 200 letters: it is drawn on that condition. Start states have different letters, else the first
    state could not be known. A sequence is identified by its letters, whatever its gaps and noise, so that splits are
    disjoint between all tasks of one grammar and number of elements; the published code gives training sequences as
    test sequences.

    The benchmark's tasks: complexity is the default with `ambiguity` from 20 to 40; memory is `gap=(1, 10), noise=0.2`;
    distractors `distractors=0.1`; generalisation a model of memory tested on `gap=(10, 10)`, 20, 50 and 100.

    Attributes:
        ambiguity: letters of the grammar.
        depth: states with the same letter; None is `ambiguity`.
        density: probability that a state has an edge for a letter.
        elements: elements in a sequence, ends of strings and distractors included.
        gap: smallest and largest number of blank frames after an element, all equally likely.
        noise: largest value that is added to an input.
        distractors: probability that an element is followed by a distractor.
        distractors_from: the first element that may be.
        starts: start states.
        grammar_seed: one grammar for all sequences.

    Source: SelectivBench (arXiv 2601.12598).

    Examples:
        >>> task = SelectivBench(ambiguity=5, elements=12)
        >>> examples = draw(task, 2, split="train", seed=0)
        >>> examples.inputs.shape == (2, task.length)
        True
    """

    ambiguity: int = 40
    depth: int | None = None
    density: float = 0.4
    elements: int = 200
    gap: Range = (1, 1)
    noise: float = 0.0
    distractors: float = 0.0
    distractors_from: int = 50
    starts: int = 4
    grammar_seed: int = 0

    longest = 200
    """Letters of the longest string; no field, as the benchmark never varies it."""

    def __post_init__(self) -> None:
        check_fields(self)
        at_least(self, ambiguity=1, elements=1, distractors_from=0)
        check_range("gap", self.gap, 0)
        if self.depth is not None:
            at_least(self, depth=1)
        if not 1 <= self.starts <= self.ambiguity:
            raise ValueError(f"starts must be from 1 to ambiguity={self.ambiguity}, got {self.starts}")
        if not 0 < self.density <= 1:
            raise ValueError(f"density must be in (0, 1], got {self.density}")
        if not 0 <= self.distractors <= 1:
            raise ValueError(f"distractors must be a probability, got {self.distractors}")
        if not 0 <= self.noise < float("inf"):
            raise ValueError(f"noise must not be negative, got {self.noise}")

    @property
    def grammar(self) -> Grammar:
        """The grammar of all sequences."""
        depth = self.depth or self.ambiguity
        return random_grammar(self.ambiguity, depth, self.density, self.starts, self.longest, self.grammar_seed)

    @property
    def states(self) -> int:
        """How many answers there are: the hidden states and the end of a string."""
        return self.ambiguity * (self.depth or self.ambiguity) + 1

    @property
    def blank(self) -> int:
        """The token of a frame of a gap."""
        return self.ambiguity + 1

    @property
    def length(self) -> int:
        """Frames of a sequence, padding included."""
        return self.elements * (1 + self.gap[1])

    @property
    def vocab_size(self) -> int:
        """States as targets and letters as inputs share the numbers from 0."""
        return max(self.states, self.ambiguity + 2)

    @property
    def chance(self) -> float:
        """Of a state drawn uniformly; one with the right letter is right `ambiguity` times as often."""
        return 1 / self.states

    def sample(self, rng: np.random.Generator, number: int, split: Split) -> Examples:
        """See `Task.sample`."""
        letters, states = self._walk(rng, number)
        frames = 1 + uniform(rng, self.gap, letters.shape)
        begin = np.cumsum(frames, axis=1) - frames
        row = np.arange(number)[:, None]
        starting = np.zeros((number, self.length), np.int32)
        starting[row, begin] = 1
        element = np.cumsum(starting, axis=1, dtype=np.int32) - 1
        inside = np.arange(self.length) < frames.sum(axis=1)[:, None]
        targets = np.where(inside, states[row, element], IGNORED).astype(np.int32)
        if self.noise:
            inputs = rng.random((number, self.length, self.ambiguity + 1), dtype=np.float32) * np.float32(self.noise)
            inputs[row, begin, letters] += 1
        else:
            inputs = np.full((number, self.length), self.blank, np.int32)
            inputs[row, begin] = letters
        return Examples(inputs, targets, answers=element, identity=hash_rows(letters))

    def _walk(self, rng: np.random.Generator, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Letters and states [number, elements]; the state of a distractor is IGNORED."""
        successor, reach = self.grammar
        letters = np.zeros((self.elements, number), np.int64)
        states = np.full((self.elements, number), IGNORED)
        row, end = np.arange(number), self.states - 1
        state, left = np.full(number, end), np.full(number, self.longest + 1)
        fresh = np.zeros(number, bool)  # the element before is one of the grammar, and late enough
        for index in range(self.elements):
            following = successor[state]
            letter = pick(rng, np.where(following >= 0, reach[left[:, None] - 1, following], 0))
            wrong = np.zeros(number, bool)
            if self.distractors:
                strange = following[:, : self.ambiguity] < 0
                wrong = fresh & (rng.random(number) < self.distractors) & strange.any(axis=1)
                letter = np.where(wrong, pick(rng, strange), letter)
            state = np.where(wrong, state, following[row, letter])
            left = np.where(state == end, self.longest + 1, left - ~wrong)
            letters[index], states[index] = letter, np.where(wrong, IGNORED, state)
            fresh = ~wrong & (index >= self.distractors_from)
        return letters.T, states.T
