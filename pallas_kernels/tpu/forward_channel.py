"""The scores and the decayed keys of a tile, with a gate per channel.

Pairs of tokens are summed level by level (`pallas_kernels.tpu.scores`), but for those inside 16 tokens of a gentle tile,
which are one product. On the way the sums of the gates grow from single tokens to the whole tile, where they are G and Z.
"""

import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.inputs import base_two
from pallas_kernels.tpu import scores
from pallas_kernels.tpu.plan import Plan
from pallas_kernels.tpu.products import TILE, lanes, product, rows, transposed
from pallas_kernels.tpu.tile import (
    BETA,
    Prepared,
    Ref,
    Stages,
    TileScratch,
    Tokens,
    erase_of,
    if_steep,
    in_turns,
    of_head,
    of_key,
    scalar_row,
)


def channel_scores(plan: Plan, tokens: Tokens, done: Prepared, scratch: TileScratch) -> Stages[Array]:
    """Fills `done.a` and `done.p` `[heads, 128, 128]`; returns whether the tile is steep, a boolean."""
    before, after = scratch.before, scratch.after
    for h in range(plan.heads):
        before[h], after[h] = scores.near_sums(base_two(of_head(tokens.g, h, plan.key)))
        yield
    is_steep = scores.steep([before[h] for h in range(plan.heads)], plan.exact)

    def steep() -> None:
        _own(plan, tokens, done)
        for h in range(plan.heads):
            before[h], after[h] = base_two(of_head(tokens.g, h, plan.key)), jnp.zeros((TILE, plan.key), jnp.float32)
        for block in scores.NEAR_BLOCKS:
            in_turns(_level(plan, tokens, done, scratch, block))

    def gentle() -> None:
        _near(plan, tokens, done, scratch)
        for h in range(plan.heads):
            before[h], after[h] = scores.next_level(before[h], after[h], scores.NEAR_BLOCKS[-1])

    if_steep(plan, is_steep, steep, gentle)
    for block in scores.FAR_BLOCKS:
        yield from _level(plan, tokens, done, scratch, block)
    return is_steep


def _wide(plan: Plan, ref: Ref, head: int) -> Array:
    """The query or key of a value head, float32 `[128, key]`."""
    return of_key(plan, ref, head).astype(jnp.float32)


def _own(plan: Plan, tokens: Tokens, done: Prepared) -> None:
    """Begins the scores with the pairs of a token with itself, which no gate decays."""
    diagonal = rows(TILE, TILE) == lanes(TILE, TILE)
    for h in range(plan.heads):
        own = product(_wide(plan, tokens.q, h), _wide(plan, tokens.k, h), plan.exact, transpose_b=True)
        done.p[h] = jnp.where(diagonal, own, 0.0)
        if done.a is not None:
            done.a[h] = jnp.zeros((TILE, TILE), jnp.float32)


def _near(plan: Plan, tokens: Tokens, done: Prepared, scratch: TileScratch) -> None:
    """Begins the scores with all pairs inside 16 tokens, of gentle gates."""
    near, earlier = scores.near(), scores.near(earlier=True)
    for h in range(plan.heads):
        of_rows, of_keys = scores.near_factors(scratch.before[h], scratch.after[h])
        if done.factors is not None:
            done.factors.near_rows(h)[...], done.factors.near_keys(h)[...] = of_rows, of_keys
        reads = [_wide(plan, tokens.q, h) * of_rows]
        if done.a is not None:
            reads.append(erase_of(plan, tokens, h).astype(jnp.float32) * of_rows)
        keys = _wide(plan, tokens.k, h) * of_keys
        part = product(jnp.concatenate(reads, 0), keys, plan.exact, transpose_b=True)
        done.p[h] = jnp.where(near, part[:TILE], 0.0)
        if done.a is not None:
            done.a[h] = jnp.where(earlier, part[TILE:], 0.0)


def _level(plan: Plan, tokens: Tokens, done: Prepared, scratch: TileScratch, block: int) -> Stages[None]:
    """Puts the pairs that meet at a level into the scores, and doubles the blocks of the sums."""
    before, after = scratch.before, scratch.after
    for h in range(plan.heads):
        factor = scores.level_factor(before[h], after[h], block)
        if done.factors is not None:
            done.factors.level(h, block)[...] = factor
        keys = _wide(plan, tokens.k, h) * factor
        reads = [scores.right_rows(_wide(plan, tokens.q, h), block) * scores.right_rows(factor, block)]
        if done.a is not None:
            erase = scores.right_rows(keys, block)
            if plan.erase_heads:
                erase = scores.right_rows(erase_of(plan, tokens, h).astype(jnp.float32), block)
                erase = erase * scores.right_rows(factor, block)
            reads.append(erase)
        part = product(jnp.concatenate(reads, 0), keys, plan.exact, transpose_b=True)
        _place(done.p, h, block, part)
        if done.a is not None:
            _place(done.a, h, block, part[len(erase) :])
        yield
    for h in range(plan.heads):
        before[h], after[h] = scores.next_level(before[h], after[h], block)
        yield


def _place(ref: Ref, head: int, block: int, part: Array) -> None:
    """Puts a level's scores, of its `right_rows`, where they belong."""
    meets = scores.meets(block)
    for here, there in scores.right_pieces(block):
        pltpu.store(ref.at[head, there], part[here], mask=meets[here])


def channel_keys(plan: Plan, tokens: Tokens, done: Prepared, scratch: TileScratch) -> Stages[None]:
    """Fills `done` with the keys and queries as they meet the state, from the sums over the whole tile."""
    for h in range(plan.heads):
        start, end = jnp.exp2(scratch.before[h]), jnp.exp2(scratch.after[h])
        if done.factors is not None:
            done.factors.start[h], done.factors.end[h] = start, end
        keys = transposed((_wide(plan, tokens.k, h) * end).astype(done.keys.dtype)).astype(jnp.float32)
        done.keys[h] = (keys * scalar_row(plan, tokens, BETA, h)).astype(done.keys.dtype)
        done.whole[h] = jnp.broadcast_to(start[TILE - 1 :], done.whole.shape[-2:])
        done.query_in[h] = (_wide(plan, tokens.q, h) * start).astype(done.query_in.dtype)
        if done.erase_in is not None:
            done.erase_in[h] = (erase_of(plan, tokens, h).astype(jnp.float32) * start).astype(done.erase_in.dtype)
        yield
