"""Synthetic tasks: seeded, vectorised generators in numpy whose train and test sequences never meet."""

from delta_jax.data.tasks.kimi_linear import MultiQueryRecall, Palindrome, Stacks
from delta_jax.data.tasks.mad import Compression, Memorization, SelectiveCopying
from delta_jax.data.tasks.mad_recall import FuzzyRecall, InContextRecall, NoisyRecall
from delta_jax.data.tasks.needles import Needles
from delta_jax.data.tasks.recall import MQAR

__all__ = [
    "MQAR",
    "Compression",
    "FuzzyRecall",
    "InContextRecall",
    "Memorization",
    "MultiQueryRecall",
    "Needles",
    "NoisyRecall",
    "Palindrome",
    "SelectiveCopying",
    "Stacks",
]
