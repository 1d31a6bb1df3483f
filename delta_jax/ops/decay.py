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

Gates are summed inside a segment only, and a factor over a range that leaves its segment is zero: its exponent is selected,
so that no sum of other segments' gates, whatever they are, has to be finite.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Bool, Float

from delta_jax.ops.precision import constant, einsum, masked, transposed


class Decay(NamedTuple):
    """Decay factors of a chunk of C tokens; `channels` is 1 for a gate per head, `key` for a gate per channel."""

    pairs: Array  # gate per head: exp(G_i - G_j) for visible i >= j, else 0: [..., C, C]; gate per channel: that mask
    levels: tuple[tuple[Array, Array], ...]  # gate per channel: (left, right) factors to the middle of every block
    start: Array  # exp(G_i): from the chunk's start through token i, [..., C, channels]
    end: Array  # exp(G_C - G_j): from after token j to the chunk's end, [..., C, channels]
    whole: Array  # exp(G_C), [..., 1, channels]


def chunk_decay(g: Float[Array, "*batch chunk channels"], reset: Bool[Array, "*#batch chunk"] | None = None) -> Decay:
    """The decay factors of a chunk from its log decays and from where segments start in it."""
    size, channels = g.shape[-2:]
    # exp is zero below -128 in float32 (-1024 in float64), so cutting there changes nothing and keeps the grid exact.
    limit, grid = (1024.0, 2.0**-34) if g.dtype == jnp.float64 else (128.0, 2.0**-10)
    g = jnp.maximum(g, -limit)
    on_grid = jnp.round(g / grid) * grid
    lower = np.tril(np.ones((size, size), bool))
    mask, subscripts = constant(lower, g), "ij,...jd->...id"
    summed = jnp.asarray(lower, g.dtype)
    if reset is not None:
        segment = jnp.cumsum(reset, axis=-1)
        mask = mask & (segment[..., :, None] == segment[..., None, :])
        summed, subscripts = mask.astype(g.dtype), "...ij,...jd->...id"
    coarse, fine = (einsum(subscripts, summed, x) for x in (on_grid, g - on_grid))

    def factor(exponent: Array, inside: Callable[[Array], Array]) -> Array:
        """exp of the exponents of tokens whose range lies inside a segment, zero for the others."""
        return jnp.exp(exponent if reset is None else jnp.where(inside(segment)[..., None], exponent, -jnp.inf))

    start = factor(coarse + fine, lambda s: s == 0)
    end = factor((coarse[..., -1:, :] - coarse) + (fine[..., -1:, :] - fine), lambda s: s == s[..., -1:])
    whole = start[..., -1:, :]
    if channels == 1:
        rows, columns = (jnp.swapaxes(x, -1, -2) for x in (coarse, fine))
        pairs = jnp.exp(jnp.where(mask, (coarse - rows) + (fine - columns), -jnp.inf))
        return Decay(pairs, (), start, end, whole)
    levels = []
    for block in _blocks(size):
        (left, right), (left_fine, right_fine) = _halves(coarse, block), _halves(fine, block)
        middle, middle_fine = left[..., -1:, :], left_fine[..., -1:, :]

        def halves(s: Array, block: int = block) -> tuple[Array, Array]:
            """Of the tokens of every block, those in the left half and in the right whose segment is that of the middle."""
            left, right = _halves(s[..., None], block)
            return (left == left[..., -1:, :])[..., 0], (right == left[..., -1:, :])[..., 0]

        to_middle = factor((middle - left) + (middle_fine - left_fine), lambda s: halves(s)[0])
        from_middle = factor((right - middle) + (right_fine - middle_fine), lambda s: halves(s)[1])
        levels.append((to_middle, from_middle))
    return Decay(mask.astype(g.dtype), tuple(levels), start, end, whole)


def decayed_scores(
    rows: Float[Array, "*batch rows chunk key"],
    keys: Float[Array, "*batch writes chunk key"],
    decay: Decay | None,
    to: DTypeLike | None = None,
) -> Float[Array, "*batch rows chunk writes chunk"]:
    """`sum_d rows_i[d] keys_j[d] exp(G_i[d] - G_j[d])` for tokens i >= j, else 0; all row sets with all key sets.

    Operands of the products are as precise as the dtype `to`, here and in the backward.
    """
    size = keys.shape[-2]
    if decay is None or not decay.levels:
        scores = _product(rows, keys, to)
        if decay is None:
            return masked(np.tril(np.ones((size, size), bool))[:, None], scores)
        return _within(scores, decay)
    own = jnp.sum(rows[..., None, :, :] * keys[..., None, :, :, :], -1)
    scores = jnp.swapaxes(own, -1, -2)[..., None] * constant(np.eye(size)[:, None], rows[..., None])
    for block, (left, right) in zip(_blocks(size), decay.levels, strict=True):
        part = _product(_right(rows, block) * right[..., None, :, :], _left(keys, block) * left[..., None, :, :], to)
        scores = scores + _place(part, block)
    return _within(scores, decay)


def _within(scores: Array, decay: Decay) -> Array:
    """Scores times the decay between their tokens; zero for pairs that do not meet, whatever they hold."""
    pairs = decay.pairs[..., None, :, None, :]
    return jnp.where(pairs != 0, scores * pairs, jnp.zeros((), scores.dtype))


def decayed_scores_backward(
    d_scores: Float[Array, "*batch rows chunk writes chunk"],
    scores: Float[Array, "*batch rows chunk writes chunk"],
    rows: Float[Array, "*batch rows chunk key"],
    keys: Float[Array, "*batch writes chunk key"],
    decay: Decay | None,
    to: DTypeLike | None = None,
) -> tuple[Array, Array, Array | None]:
    """Cotangents of `rows`, `keys` and of the log decays through `decayed_scores`; `d_scores` is 0 where i < j."""
    size = keys.shape[-2]
    if decay is None or not decay.levels:
        d_product = d_scores if decay is None else _within(d_scores, decay)
        d_rows, d_keys = _product_backward(d_product, rows, keys, to)
        if decay is None:
            return d_rows, d_keys, None
        crossing = einsum("...ij,sj->...is", jnp.sum(d_scores * scores, (-4, -2)), _earlier(size, keys.dtype))
        d_g = jnp.sum(masked(np.tril(np.ones((size, size), bool)), crossing), -2)
        return d_rows, d_keys, d_g[..., None]
    d_scores = _within(d_scores, decay)
    diagonal = jnp.diagonal(d_scores, axis1=-3, axis2=-1)[..., None]
    d_rows, d_keys = jnp.sum(diagonal * keys[..., None, :, :, :], -3), jnp.sum(diagonal * rows[..., None, :, :], -4)
    d_g = jnp.zeros_like(keys[..., 0, :, :])
    for block, (left, right) in zip(_blocks(size), decay.levels, strict=True):
        left, right = left[..., None, :, :], right[..., None, :, :]
        row, key = _right(rows, block), _left(keys, block)
        d_row, d_key = _product_backward(_corners(d_scores, block), row * right, key * left, to)
        d_row, d_key = d_row * right, d_key * left
        # The pairs of a block that cross a token: in its left half those whose key comes before the token, in its right
        # half those whose row does not.
        earlier = _earlier(block, keys.dtype)
        d_left = _einsum("st,...td->...sd", earlier, jnp.sum(key * d_key, -3))
        d_right = _einsum("st,...td->...sd", 1 - earlier, jnp.sum(row * d_row, -3))
        d_row, d_key = jnp.moveaxis(d_row, -3, -4), jnp.moveaxis(d_key, -3, -4)
        d_rows = d_rows + jnp.stack([jnp.zeros_like(d_row), d_row], -3).reshape(rows.shape)
        d_keys = d_keys + jnp.stack([d_key, jnp.zeros_like(d_key)], -3).reshape(keys.shape)
        d_g = d_g + jnp.stack([d_left, d_right], -3).reshape(d_g.shape)
    return d_rows, d_keys, d_g


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


def merged(x: Float[Array, "*batch sets chunk dim"]) -> Float[Array, "*batch sets_chunk dim"]:
    """The tokens of all sets below one another: one product of `sets * chunk` rows is what CPUs run well."""
    return x.reshape(*x.shape[:-3], -1, x.shape[-1])


def _product(rows: Array, keys: Array, to: DTypeLike | None) -> Array:
    scores = _einsum("...ik,...jk->...ij", merged(rows), merged(keys), to=to)
    return scores.reshape(*rows.shape[:-1], *keys.shape[-3:-1])


def _product_backward(d_product: Array, rows: Array, keys: Array, to: DTypeLike | None) -> tuple[Array, Array]:
    flat_rows, flat_keys = merged(rows), merged(keys)
    flat_d = d_product.reshape(*flat_rows.shape[:-1], -1)
    d_rows = _einsum("...ij,...jk->...ik", flat_d, flat_keys, to=to).reshape(rows.shape)
    return d_rows, _einsum("...ji,...ik->...jk", transposed(flat_d), flat_rows, to=to).reshape(keys.shape)


def _einsum(subscripts: str, *operands: Array, to: DTypeLike | None = None) -> Array:
    """`einsum` in which heads and blocks of a level, the last two of four axes, are one.

    XLA's CPU backend aborts the process on products of eight axes (jaxlib 0.12.0.1), which two vmaps would make of six.
    """
    batch = operands[-1].shape[:-2]
    if len(batch) < 4:
        return einsum(subscripts, *operands, to=to)
    flat = [x.reshape(*x.shape[:-4], -1, *x.shape[-2:]) if x.ndim > 5 else x for x in operands]
    product = einsum(subscripts, *flat, to=to)
    return product.reshape(*batch, *product.shape[-2:])


def _blocks(size: int) -> list[int]:
    """The block sizes at which the pairs of a chunk meet: 1, 2, 4, ..., size / 2."""
    return [2**level for level in range(size.bit_length() - 1)]


def _halves(x: Array, block: int) -> tuple[Array, Array]:
    """The left and right halves of every block of `2 * block` tokens: `[..., blocks, block, dim]` each."""
    x = x.reshape(*x.shape[:-2], -1, 2, block, x.shape[-1])
    return x[..., 0, :, :], x[..., 1, :, :]


def _left(sets: Array, block: int) -> Array:
    """The left halves of several sets, `[..., blocks, sets, block, key]`."""
    return jnp.moveaxis(_halves(sets, block)[0], -4, -3)


def _right(sets: Array, block: int) -> Array:
    """The right halves of several sets, `[..., blocks, sets, block, key]`."""
    return jnp.moveaxis(_halves(sets, block)[1], -4, -3)


def _place(part: Array, block: int) -> Array:
    """`[..., blocks, rows, block, writes, block]` at the lower-left quarters of the diagonal blocks of a zero
    `[..., rows, C, writes, C]`."""
    blocks, rows, _, writes, _ = part.shape[-5:]
    size = 2 * block * blocks
    own = np.eye(blocks, dtype=bool)[:, None, None, None, :, None, None]
    quarter = np.array([[0, 0], [1, 0]], bool)[None, :, None, None, None, :, None]
    part = jnp.moveaxis(part, -5, -4)
    part = masked(own & quarter, part[..., :, None, :, :, None, None, :])
    return part.reshape(*part.shape[:-8], rows, size, writes, size)


def _corners(scores: Array, block: int) -> Array:
    """The reverse of `_place`: `[..., blocks, rows, block, writes, block]`."""
    blocks, writes = scores.shape[-1] // (2 * block), scores.shape[-2]
    scores = scores.reshape(*scores.shape[:-3], blocks, 2, block, writes, blocks, 2, block)[..., 1, :, :, :, 0, :]
    return jnp.moveaxis(jnp.sum(masked(np.eye(blocks, dtype=bool)[:, None, None, :, None], scores), -2), -4, -5)
