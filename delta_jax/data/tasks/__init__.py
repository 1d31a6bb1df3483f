"""Synthetic tasks: seeded, vectorised generators in numpy whose train and test sequences never meet."""
