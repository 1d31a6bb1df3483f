"""Synthetic tasks: seeded, vectorised generators in numpy whose train and test sequences never meet."""

from delta_jax.data.tasks.corpus import Corpus
from delta_jax.data.tasks.examples import IGNORED, Examples, Split, Task, draw, identities
from delta_jax.data.tasks.formal import BracketedArithmetic, ModularArithmetic, Parity
from delta_jax.data.tasks.graphs import GraphConnectivity
from delta_jax.data.tasks.groups import WordProblem
from delta_jax.data.tasks.kimi_linear import MultiQueryRecall, Palindrome, Stacks
from delta_jax.data.tasks.mad import Compression, Memorization, SelectiveCopying
from delta_jax.data.tasks.mad_recall import FuzzyRecall, InContextRecall, NoisyRecall
from delta_jax.data.tasks.matrices import MatrixProducts
from delta_jax.data.tasks.needles import Needles
from delta_jax.data.tasks.recall import MQAR
from delta_jax.data.tasks.regbench import RegBench
from delta_jax.data.tasks.selective import SelectivBench

__all__ = [
    "IGNORED",
    "MQAR",
    "BracketedArithmetic",
    "Compression",
    "Corpus",
    "Examples",
    "FuzzyRecall",
    "GraphConnectivity",
    "InContextRecall",
    "MatrixProducts",
    "Memorization",
    "ModularArithmetic",
    "MultiQueryRecall",
    "Needles",
    "NoisyRecall",
    "Palindrome",
    "Parity",
    "RegBench",
    "SelectivBench",
    "SelectiveCopying",
    "Split",
    "Stacks",
    "Task",
    "WordProblem",
    "draw",
    "identities",
]
