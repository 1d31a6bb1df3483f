"""Decayed scores of a tile: sum_d x_i[d] k_j[d] exp(g_{j+1}[d] + ... + g_i[d]) for i >= j, for erase keys and queries.

Gates arrive as base-2 logarithms. Every exponent is a sum over the very tokens between j and i, never a difference of two
sums, so a gate of any size leaves its neighbours exact, and no exponent is above zero for gates that are not.

- A gate per head: D_ij is the exponential of one product, (g_s for s <= i) with (1 for s > j).
- A gate per channel: the pairs are split by the block size at which they meet (1, 2, ..., 64; j in the left half of a block,
  i in the right) and a level's product is rebased on the middle of its block. The sums from a token to the ends of its block
  double with the block.
- Where no gate of a tile is steep, all pairs inside 16 tokens are one product, rebased on the middle: exponents of both
  signs, but of a size at which nothing overflows and no digit is lost.

Source: the levels of `delta_jax.ops.decay`; sub-blocks rebased on their start: arXiv 2312.06635 section 4.3.
"""

import functools
from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu.products import TILE, lanes, product, rows, split

NEAR = 16  # tokens that are one product where gates are gentle
NEAR_BLOCKS, FAR_BLOCKS = (1, 2, 4, 8), (16, 32, 64)  # the levels inside that many tokens, and those beyond
BLOCKS = NEAR_BLOCKS + FAR_BLOCKS


def steep(sums: Sequence[Array], exact: bool) -> Array:
    """Whether gates are too strong for products over 16 tokens, from the sums up to each token of `near_sums`.

    The factors are the exponentials of the sums either way. In bfloat16 the limit is what float32 can hold, and room for the
    cotangents, 2^80; in float32 the last digits of the exponents, 2^16.
    """
    return jnp.max(functools.reduce(jnp.maximum, map(jnp.abs, sums))) > (16.0 if exact else 80.0)


def near(*, earlier: bool = False) -> Array:
    """The pairs i >= j inside the same 16 tokens, or those with i > j."""
    row, lane = rows(TILE, TILE), lanes(TILE, TILE)
    return (row // NEAR == lane // NEAR) & (row > lane if earlier else row >= lane)


def near_sums(g: Array) -> tuple[Array, Array]:
    """The sums of the gates of every 8 tokens up to each token, and over those that follow."""
    registers = g.reshape(TILE // 8, 8, -1)
    place = (rows(TILE, g.shape[1]) % 8).reshape(registers.shape)
    for shift in (1, 2, 4):
        registers = registers + jnp.where(place >= shift, pltpu.roll(registers, shift, 1), 0.0)
    after = jnp.broadcast_to(registers[:, 7:], registers.shape) - registers
    return registers.reshape(g.shape), after.reshape(g.shape)


def near_factors(before: Array, after: Array) -> tuple[Array, Array]:
    """Decays between each token and the middle of its 16: those of rows, and of keys, their inverses."""
    exponent = _right_else_left(before, -after, NEAR // 2)
    return jnp.exp2(exponent), jnp.exp2(-exponent)


def near_suffix_sums(x: Array) -> Array:
    """The sums over every 16 rows from each row on."""
    registers = x.reshape(TILE // 8, 8, -1)
    place = (rows(TILE, x.shape[1]) % 8).reshape(registers.shape)
    for shift in (1, 2, 4):
        registers = registers + jnp.where(place < 8 - shift, pltpu.roll(registers, 8 - shift, 1), 0.0)
    x, pieces = registers.reshape(x.shape), []
    for start in range(0, TILE, NEAR):
        pieces += [x[start : start + 8] + x[start + 8 : start + 9], x[start + 8 : start + NEAR]]
    return jnp.concatenate(pieces, 0)


def pair_decay(g: Array, exact: bool) -> Array:
    """exp(sum of g over (j, i]) for i >= j, else 0, `[128, 128]`, from the gates `[1, 128]` of a head."""
    lower, after = rows(TILE, TILE) >= lanes(TILE, TILE), rows(TILE, TILE) > lanes(TILE, TILE)
    parts = (g,) if exact else tuple(x.astype(jnp.float32) for x in split(g))
    left = jnp.concatenate([jnp.where(lower, jnp.broadcast_to(x, (TILE, TILE)), 0.0) for x in parts], 1)
    total = product(left, jnp.concatenate([after.astype(jnp.float32)] * len(parts), 0), exact)
    return jnp.exp2(jnp.where(lower, total, -1e30))


def right_pieces(block: int) -> list[tuple[slice, slice]]:
    """Where the rows lie that can meet a key at this level: their places among themselves and among the tokens.

    From blocks of 8 (a register's height) on these are the right halves; below that all rows are taken.
    """
    if block < 8:
        return [(slice(0, TILE), slice(0, TILE))]
    return [
        (slice(n * block, (n + 1) * block), slice((2 * n + 1) * block, (2 * n + 2) * block))
        for n in range(TILE // (2 * block))
    ]


def left_pieces(block: int) -> list[slice]:
    """Likewise the tokens whose keys can be met: the left halves."""
    return (
        [slice(tokens.start - block, tokens.start) for _, tokens in right_pieces(block)]
        if block >= 8
        else [slice(0, TILE)]
    )


def right_rows(x: Array, block: int) -> Array:
    pieces = right_pieces(block)
    return x if len(pieces) == 1 and block < 8 else jnp.concatenate([x[tokens] for _, tokens in pieces], 0)


def meets(block: int) -> Array:
    """Which pairs of `right_rows` and tokens meet at this level: i right, j left in the same block of `2 * block` tokens."""
    height = TILE if block < 8 else TILE // 2
    row, lane = rows(height, TILE), lanes(height, TILE)
    if block >= 8:
        return (row // block == lane // (2 * block)) & (lane // block % 2 == 0)
    return (row // (2 * block) == lane // (2 * block)) & (row // block % 2 == 1) & (lane // block % 2 == 0)


def level_factor(before: Array, after: Array, block: int) -> Array:
    """A token's decay to or from the middle of its block of `2 * block` tokens.

    `before` and `after` hold the sums of the gates of its half up to the token, and of those that follow.
    """
    return jnp.exp2(_right_else_left(before, after, block))


def _right_else_left(right: Array, left: Array, block: int) -> Array:
    """The rows of right halves of blocks of `2 * block` tokens from one array, those of left halves from the other."""
    if block < 8:
        return jnp.where(rows(*right.shape) // block % 2 == 1, right, left)
    pieces = []
    for _, tokens in right_pieces(block):
        pieces += [left[tokens.start - block : tokens.start], right[tokens]]
    return jnp.concatenate(pieces, 0)


def next_level(before: Array, after: Array, block: int) -> tuple[Array, Array]:
    """The sums in halves of twice the size: the right half adds the left half's total, and the reverse."""
    width = before.shape[1]
    if block >= 8:
        new_before, new_after = [], []
        for start in range(0, TILE, 2 * block):
            left, end = start + block, start + 2 * block
            new_before += [before[start:left], before[left:end] + before[left - 1 : left]]
            new_after += [after[start:left] + before[end - 1 : end], after[left:end]]
        return jnp.concatenate(new_before, 0), jnp.concatenate(new_after, 0)
    right = rows(TILE, width) // block % 2 == 1
    if block == 1:
        left_total, right_total = pltpu.roll(before, 1, 0), pltpu.roll(before, TILE - 1, 0)
    else:
        registers = before.reshape(TILE // 8, 8, width)
        first = (rows(TILE, width) % 8 < 2 * block).reshape(registers.shape)

        def spread(offset: int) -> Array:
            total = jnp.broadcast_to(registers[:, offset : offset + 1], registers.shape)
            if block == 2:
                second = jnp.broadcast_to(registers[:, offset + 4 : offset + 5], registers.shape)
                total = jnp.where(first, total, second)
            return total.reshape(before.shape)

        left_total, right_total = spread(block - 1), spread(2 * block - 1)
    return before + jnp.where(right, left_total, 0.0), after + jnp.where(right, 0.0, right_total)
