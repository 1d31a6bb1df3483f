"""What a tile needs besides the state: scores, decayed keys and inverses, stage by stage.

None of it waits for the tiles before, so the forward prepares one tile while the state passes another.
"""

import jax.numpy as jnp
from jax import Array

from pallas_kernels.tpu import inverse, scores
from pallas_kernels.tpu.forward_channel import channel_keys, channel_scores
from pallas_kernels.tpu.plan import Plan
from pallas_kernels.tpu.products import TILE, column, lanes, product, rows, transposed
from pallas_kernels.tpu.tile import (
    BETA,
    END,
    GATE,
    Prepared,
    Stages,
    TileScratch,
    Tokens,
    erase_of,
    of_head,
    scalar_row,
    start_columns,
)


def prepare(plan: Plan, tokens: Tokens, done: Prepared, scratch: TileScratch) -> Stages[Array | None]:
    """Fills `done` but for what `complete` adds; returns whether the tile is steep, with a gate per channel."""
    if plan.gate == "channel":
        return (yield from channel_scores(plan, tokens, done, scratch))
    yield from _head_scores(plan, tokens, done)
    yield from _head_keys(plan, tokens, done)
    return None


def complete(plan: Plan, tokens: Tokens, done: Prepared, scratch: TileScratch, *, inverts: bool = True) -> Stages[None]:
    """Fills `done` with the keys of a gate per channel, and, if it `inverts`, with the inverses."""
    if plan.gate == "channel":
        yield from channel_keys(plan, tokens, done, scratch)
    if plan.erases and inverts:
        yield from _invert(plan, tokens, done, scratch)


def _head_scores(plan: Plan, tokens: Tokens, done: Prepared) -> Stages[None]:
    lower = rows(TILE, TILE) >= lanes(TILE, TILE)
    if done.decay is not None:
        columns = start_columns(plan, tokens)
        for h in range(plan.heads):
            done.start[h] = column(columns, h, TILE)
            done.decay[h] = scores.pair_decay(scalar_row(plan, tokens, GATE, h), plan.exact)
            yield

    def decayed(raw: Array, h: int) -> Array:
        return jnp.where(lower, raw, 0.0) if done.decay is None else raw * done.decay[h]

    for j in range(plan.key_heads):
        heads = range(j * plan.per_key, (j + 1) * plan.per_key)
        reads = [of_head(tokens.q, j, plan.key)]
        if plan.erases:
            own = heads if plan.erase_heads == plan.heads else heads[:1]
            reads += [erase_of(plan, tokens, h) for h in own]
        raw = product(jnp.concatenate(reads, 0), of_head(tokens.k, j, plan.key), plan.exact, transpose_b=True)
        for n, h in enumerate(heads):
            if plan.erases:
                place = TILE * (1 + min(n, len(reads) - 2))
                done.a[h] = decayed(raw[place : place + TILE], h)
            done.p[h] = decayed(raw[:TILE], h)
            yield


def _head_keys(plan: Plan, tokens: Tokens, done: Prepared) -> Stages[None]:
    for j in range(plan.key_heads):
        k = transposed(of_head(tokens.k, j, plan.key)).astype(jnp.float32)
        for h in range(j * plan.per_key, (j + 1) * plan.per_key):
            scale = scalar_row(plan, tokens, BETA, h)
            if plan.gate == "head":
                scale = scale * scalar_row(plan, tokens, END, h)
            done.keys[h] = (k * scale).astype(done.keys.dtype)
            yield


def _invert(plan: Plan, tokens: Tokens, done: Prepared, scratch: TileScratch) -> Stages[None]:
    """Fills `done.x`, from `done.a`."""

    def blocks(h: int, size: int, period: int, offset: int) -> Array:
        """The blocks at rows n * period + offset and the lanes of n, side by side, times beta."""
        lane, result = lanes(size, TILE) // period, done.a[h, offset : offset + size]
        for n in range(1, TILE // period):
            result = jnp.where(lane == n, done.a[h, n * period + offset : n * period + offset + size], result)
        return result * scalar_row(plan, tokens, BETA, h)

    for h in range(plan.heads):
        inverse.base_columns(blocks(h, 16, 16, 0), scratch.lower_columns.at[h], scratch.upper_columns.at[h])
        yield
    for h in range(plan.heads):
        top, bottom = inverse.invert_base(scratch.lower_columns.at[h], scratch.upper_columns.at[h])
        scratch.inverse_16[h, :8], scratch.inverse_16[h, 8:] = top, bottom
        yield
    pairs = [(h, min(h + 1, plan.heads - 1)) for h in range(0, plan.heads, 2)]
    for size, source, merged in ((16, scratch.inverse_16, scratch.inverse_32), (32, scratch.inverse_32, done.x)):
        for n, (first, second) in enumerate(pairs):
            corners = [blocks(h, size, 2 * size, size) for h in (first, second)]
            right = inverse.merge_right(source[first], source[second], corners[0], corners[1], plan.exact)
            scratch.crossing[n, :size] = right
            yield
        for n, (first, second) in enumerate(pairs):
            right = scratch.crossing[n, :size]
            merged[first], merged[second] = inverse.merge_left(source[first], source[second], right, plan.exact)
            yield
