"""Decays inside a chunk: cumulative gates without cancellation, decayed scores, and the gradient of the gates.

Every factor of the chunkwise form is exp(sum of g over a range of tokens), for a range between two tokens of the chunk,
from its start to a token, or from a token to its end. Three choices keep these exact for gates of any size:

- A float32 cumulative sum G spoils differences: after one gate of -1e4, G_i - G_j has lost everything below 1e-3. So G is
  kept as a coarse part, exact because it is a sum of numbers on a grid, and a small remainder.
- With a gate per channel the decayed score sum_d q_i[d] k_j[d] exp(G_i[d] - G_j[d]) is no product of two matrices. The
  pairs i > j are split by the block size at which they meet (1, 2, 4, ...: j in the left half of a block, i in the right)
  and each level is rebased on the middle of its block: exp(G_i - G_mid) exp(G_mid - G_j), no exponent above zero.
- The gradient of a gate is gathered from the factors whose range holds its token, all of which carry that gate's decay.
  The short form q dq + e de - k dk is a difference of large numbers and drowns the gradient of a strong gate.

A segment boundary is a mask on the same factors.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float

from delta_jax.ops.precision import einsum


class Decay(NamedTuple):
    """Decay factors of a chunk of C tokens; `channels` is 1 for a gate per head, `key` for a gate per channel."""

    pairs: Array | None  # gate per head: exp(G_i - G_j) for i >= j, else 0: [..., C, C]; gate per channel: the mask alone
    levels: tuple[Array, ...]  # gate per channel: a factor per level, [..., C, key]; empty for a gate per head
    start: Array  # exp(G_i): from the chunk's start through token i, [..., C, channels]
    end: Array  # exp(G_C - G_j): from after token j to the chunk's end, [..., C, channels]
    whole: Array  # exp(G_C), [..., 1, channels]


def meeting_level(size: int) -> np.ndarray:
    """For i > j the block size (a power of two) at which tokens i and j meet, as left and right half; else 0."""
    row, column = np.indices((size, size))
    differing = np.where(row > column, row ^ column, 0)
    return np.where(differing > 0, 2 ** np.floor(np.log2(np.maximum(differing, 1))).astype(int), 0)


def chunk_decay(
    g: Float[Array, "*batch chunk channels"], reset: Bool[Array, "*#batch chunk"] | None = None
) -> Decay:
    """The decay factors of a chunk from its log decays and from where segments start in it."""
    size, channels = g.shape[-2:]
    # exp is zero below -128 in float32 (-1024 in float64), so cutting there changes nothing and keeps the grid exact.
    limit, grid = (1024.0, 2.0**-34) if g.dtype == jnp.float64 else (128.0, 2.0**-10)
    g = jnp.maximum(g, -limit)
    on_grid = jnp.round(g / grid) * grid
    lower = np.tril(np.ones((size, size), bool))
    coarse, fine = (einsum("ij,...jd->...id", jnp.asarray(lower, g.dtype), x) for x in (on_grid, g - on_grid))

    def between(index: np.ndarray | slice) -> Array:
        """Log decay from after the tokens at `index` to each token (negative of it where the token comes first)."""
        return (coarse - coarse[..., index, :]) + (fine - fine[..., index, :])

    start, end = jnp.exp(coarse + fine), jnp.exp(-between(slice(size - 1, size)))
    whole = start[..., -1:, :]
    mask = jnp.asarray(lower)
    if reset is not None:
        segment = jnp.cumsum(reset, axis=-1)
        mask = mask & (segment[..., :, None] == segment[..., None, :])
        start = start * (segment == 0)[..., None]
        end = end * (segment == segment[..., -1:])[..., None]
        whole = whole * (segment[..., -1:] == 0)[..., None]
    if channels == 1:
        rows, columns = (jnp.swapaxes(x, -1, -2) for x in (coarse, fine))
        pairs = jnp.exp(jnp.where(mask, (coarse - rows) + (fine - columns), -jnp.inf))
        return Decay(pairs, (), start, end, whole)
    token, levels = np.arange(size), []
    for block in 2 ** np.arange(size.bit_length() - 1):
        middle = token // (2 * block) * (2 * block) + block - 1
        right = ((token & block) > 0)[:, None]
        levels.append(jnp.exp(jnp.where(right, 1.0, -1.0).astype(g.dtype) * between(middle)))
    return Decay(mask.astype(g.dtype), tuple(levels), start, end, whole)


def decayed_scores(
    rows: Float[Array, "*batch rows chunk key"], keys: Float[Array, "*batch chunk key"], decay: Decay | None
) -> Float[Array, "*batch rows chunk chunk"]:
    """`sum_d rows_i[d] keys_j[d] exp(G_i[d] - G_j[d])` for i >= j, and 0 above the diagonal; several row sets at once."""
    size = keys.shape[-2]
    if decay is None or not decay.levels:
        scores = _product(rows, keys)
        return jnp.where(np.tril(np.ones((size, size), bool)), scores, 0) if decay is None else scores * decay.pairs[..., None, :, :]
    meets = meeting_level(size)
    scores = jnp.sum(rows * keys[..., None, :, :], -1)[..., None] * jnp.eye(size, dtype=keys.dtype)
    for level, factor in enumerate(decay.levels):
        part = _product(rows * factor[..., None, :, :], keys * factor)
        scores = scores + jnp.where(meets == 2**level, part, 0)
    return scores * decay.pairs[..., None, :, :]


def decayed_scores_backward(
    d_scores: Float[Array, "*batch rows chunk chunk"],
    scores: Float[Array, "*batch rows chunk chunk"],
    rows: Float[Array, "*batch rows chunk key"],
    keys: Float[Array, "*batch chunk key"],
    decay: Decay | None,
) -> tuple[Array, Array, Array | None]:
    """Cotangents of `rows`, `keys` and of the log decays through `decayed_scores`; `d_scores` is 0 above the diagonal."""
    size = keys.shape[-2]
    if decay is None or not decay.levels:
        d_product = d_scores if decay is None else d_scores * decay.pairs[..., None, :, :]
        d_rows, d_keys = _product_backward(d_product, rows, keys)
        if decay is None:
            return d_rows, d_keys, None
        crossing = einsum("...ij,js->...is", jnp.sum(d_scores * scores, -3), _earlier(size, keys.dtype).T)
        d_g = jnp.sum(jnp.where(np.tril(np.ones((size, size), bool)), crossing, 0), -2)
        return d_rows, d_keys, d_g[..., None]
    d_scores = d_scores * decay.pairs[..., None, :, :]
    meets, token = meeting_level(size), np.arange(size)
    diagonal = jnp.diagonal(d_scores, axis1=-2, axis2=-1)[..., None]
    d_rows, d_keys = diagonal * keys[..., None, :, :], jnp.sum(diagonal * rows, -3)
    terms, gather = [], []
    for level, factor in enumerate(decay.levels):
        row_factor = factor[..., None, :, :]
        d_part = jnp.where(meets == 2**level, d_scores, 0)
        d_row, d_key = _product_backward(d_part, rows * row_factor, keys * factor)
        d_row, d_key = d_row * row_factor, d_key * factor
        d_rows, d_keys = d_rows + d_row, d_keys + d_key
        # A pair crosses a token of the right half if the row comes at or after it, one of the left half if the key
        # comes before it; on the other half of its level d_row (d_key) is zero.
        terms.append(jnp.sum(rows * d_row, -3) + keys * d_key)
        half = token // 2**level
        right = (half % 2 == 1)[None, :]
        after = np.where(right, token[None, :] >= token[:, None], token[None, :] < token[:, None])
        gather.append(after & (half[:, None] == half[None, :]))
    matrix = jnp.asarray(np.concatenate(gather, 1), keys.dtype)
    return d_rows, d_keys, einsum("st,...td->...sd", matrix, jnp.concatenate(terms, -2))


def boundary_gate_gradient(
    start_terms: Float[Array, "*batch chunk channels"],
    end_terms: Float[Array, "*batch chunk channels"],
    whole_term: Float[Array, "*batch 1 channels"],
) -> Float[Array, "*batch chunk channels"]:
    """Cotangent of the log decays through `start`, `end` and `whole`, given `factor * d_factor` of each."""
    size = start_terms.shape[-2]
    earlier = _earlier(size, start_terms.dtype)
    matrix = jnp.concatenate([1 - earlier, earlier], 1)
    return einsum("st,...td->...sd", matrix, jnp.concatenate([start_terms, end_terms], -2)) + whole_term


def _earlier(size: int, dtype: jnp.dtype) -> Array:
    """`[s, t]` is 1 where t comes before s."""
    return jnp.asarray(np.tril(np.ones((size, size)), -1), dtype)


def _product(rows: Array, keys: Array) -> Array:
    """All row sets against the keys as one product of `rows * chunk` rows, which is what CPUs run well."""
    flat = rows.reshape(*rows.shape[:-3], -1, rows.shape[-1])
    return einsum("...ik,...jk->...ij", flat, keys).reshape(*rows.shape[:-1], keys.shape[-2])


def _product_backward(d_product: Array, rows: Array, keys: Array) -> tuple[Array, Array]:
    flat_d = d_product.reshape(*d_product.shape[:-3], -1, d_product.shape[-1])
    flat_rows = rows.reshape(*rows.shape[:-3], -1, rows.shape[-1])
    d_rows = einsum("...ij,...jk->...ik", flat_d, keys).reshape(rows.shape)
    return d_rows, einsum("...ij,...ik->...jk", flat_d, flat_rows)
