"""Synthetic tasks: seeded, vectorised generators in numpy whose train and test sequences never meet."""

from delta_jax.data.tasks.examples import IGNORED, Examples, Split, Task, draw, identities

__all__ = ["IGNORED", "Examples", "Split", "Task", "draw", "identities"]
