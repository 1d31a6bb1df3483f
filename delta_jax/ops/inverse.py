"""The inverse of a unit lower-triangular matrix, by block recursion on products."""

import numpy as np
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from delta_jax.ops.precision import constant, einsum, masked


def unit_lower_inverse(a: Float[Array, "*batch c c"], to: DTypeLike | None = None) -> Float[Array, "*batch c c"]:
    """Inverts `I + a` for a strictly lower-triangular `a` (what stands on or above its diagonal is not read);
    `to` as in `einsum`.

    With the inverses X of the diagonal blocks of size b known, those of size 2b follow from one correction a level,

        X <- X - X A_b X,        A_b the lower-left quarter of every diagonal block of size 2b.

    Only blocks of the inverse itself are ever multiplied, never powers of `a`: the inverse of the delta rule stays of order
    one where the powers of 64 repeated keys reach 1e17 (a Neumann or doubling series loses every digit there).
    Where the size is no power of two, the last blocks are cut short. Source: the Bunch-Hopcroft recursion,
    arXiv 2605.21325 section 3.
    """
    size = a.shape[-1]
    row, column = np.indices((size, size))
    level = np.where(row > column, row ^ column, 0)  # the highest differing bit is the block size at which a pair meets
    x = constant(np.eye(size), a) - masked(level == 1, a)
    block = 2
    while block < size:
        corner = masked((level >= block) & (level < 2 * block), a)
        x = x - einsum("...ij,...jk->...ik", einsum("...ij,...jk->...ik", x, corner, to=to), x, to=to)
        block *= 2
    return x
