"""The inverse X of I + L, L strictly lower triangular `[64, 64]`, by block recursion from blocks of one.

With X_n the inverse of the diagonal blocks of n, and C the part of L that joins two of them,

    X_2n = X_n - X_n C X_n          C X_n = the rows and columns of L X_n that C has, since X_n is block diagonal

Only blocks of the inverse are multiplied, never powers of L. The products are float32 in three of bfloat16: with eigenvalues
below zero their sums cancel.
"""

import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu.levels import meets
from pallas_kernels.gpu.plan import CHUNK
from pallas_kernels.gpu.warpgroup import Ref, indices, product, put_split, split_pairs


def invert(lower: Array, matrix: Ref, x: Ref, joined: Ref) -> None:
    """Writes X into `x`; all three references are split matrices `[2, 64, 64]`, `matrix` and `joined` scratch."""
    row, column = indices(CHUNK, CHUNK)
    result = jnp.where(row == column, 1.0, 0.0) - jnp.where((row ^ column) < 2, lower, 0.0)
    put_split(matrix, lower)
    put_split(x, result)
    for n in (2, 4, 8, 16, 32):
        plgpu.commit_smem()
        put_split(joined, jnp.where(meets(n), product(*split_pairs(matrix, x)), 0.0))
        plgpu.commit_smem()
        result = result - product(*split_pairs(x, joined))
        put_split(x, result)
