"""Iterated products of small matrices over the integers modulo a number."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from delta_jax.config import check_fields
from delta_jax.data.tasks.draws import at_least
from delta_jax.data.tasks.examples import IGNORED, Examples, Split

__all__ = ["MatrixProducts"]


@dataclass(frozen=True, kw_only=True)
class MatrixProducts:
    """The first entry of the product so far, M_1 M_2 ... M_t modulo m, of random 3 x 3 matrices.

    Layout: the entries of M_1 row by row, one token each, then those of M_2, and so on; the entry (1, 1) of the product is
    asked at the last token of every matrix. An entry is its own token.

    Matrices are invertible unless told otherwise: products of others soon are zero, and so is every answer. Modulo 2 this
    is the word problem of a group of 168 elements that is not solvable, GL(3, 2).

    Attributes:
        matrices: how many a sequence has; the paper trains on up to 100 and tests on up to 300.
        modulus: m.
        invertible: draw uniformly from the matrices with an inverse modulo m, not from all.

    Source: the task is that of Merrill et al., Why Are Linear RNNs More Parallelizable? (arXiv 2603.03612), where the
    numbers are not given to us; the spelling of matrices is ours.

    Examples:
        >>> draw(MatrixProducts(matrices=4), 3, split="train", seed=0).inputs.shape  # nine entries each
        (3, 36)
    """

    matrices: int = 100
    modulus: int = 2
    invertible: bool = True

    def __post_init__(self) -> None:
        check_fields(self)
        at_least(self, matrices=1, modulus=2)

    @property
    def length(self) -> int:
        """Positions of the inputs."""
        return 9 * self.matrices

    @property
    def vocab_size(self) -> int:
        """The numbers below the modulus."""
        return self.modulus

    @property
    def chance(self) -> float:
        """Of a number drawn uniformly; modulo 2 the constant answer 1 is right 4 times of 7."""
        return 1 / self.modulus

    def sample(self, rng: np.random.Generator, number: int, split: Split) -> Examples:
        """See `Task.sample`."""
        matrices = rng.integers(0, self.modulus, (number * self.matrices, 3, 3))
        if self.invertible:
            again = np.flatnonzero(~self._has_inverse(matrices))
            while len(again):
                matrices[again] = rng.integers(0, self.modulus, (len(again), 3, 3))
                again = again[~self._has_inverse(matrices[again])]
        matrices = matrices.reshape(number, self.matrices, 3, 3)
        inputs = matrices.reshape(number, -1).astype(np.int32)
        targets = np.full_like(inputs, IGNORED)
        row = matrices[:, 0, 0]  # the first row of the product is all that its first entry needs
        for step in range(self.matrices):
            row = row if step == 0 else np.einsum("ni,nij->nj", row, matrices[:, step]) % self.modulus
            targets[:, 9 * step + 8] = row[:, 0]
        return Examples(inputs, targets)

    def _has_inverse(self, matrices: np.ndarray) -> np.ndarray:
        first, second, third = np.moveaxis(matrices, -2, 0)
        determinant = (np.cross(first, second) % self.modulus * third).sum(axis=-1)
        return np.gcd(determinant % self.modulus, self.modulus) == 1
