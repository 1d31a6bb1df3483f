"""Synthetic tasks: seeded, vectorised generators in numpy whose train and test sequences never meet."""

from delta_jax.data.tasks.formal import BracketedArithmetic, ModularArithmetic, Parity
from delta_jax.data.tasks.graphs import GraphConnectivity
from delta_jax.data.tasks.groups import WordProblem
from delta_jax.data.tasks.matrices import MatrixProducts
from delta_jax.data.tasks.regbench import RegBench
from delta_jax.data.tasks.selective import SelectivBench

__all__ = [
    "BracketedArithmetic",
    "GraphConnectivity",
    "MatrixProducts",
    "ModularArithmetic",
    "Parity",
    "RegBench",
    "SelectivBench",
    "WordProblem",
]
