"""A tile of 128 tokens of several heads: what does not depend on the state, and the pass that carries the state through.

With the symbols of `delta_jax.ops.chunkwise`, b = beta and G, Z the sums of the gates up to and after a token, of one tile:

    A_ij = sum_d e_i k_j exp(G_i - G_j)   (i > j)        P_ij = sum_d q_i k_j exp(G_i - G_j)   (i >= j)
    B = V - (exp(G) E) S                                 what the state does not know yet
    (I + A diag(b)) Y = B                                what is left of it once the earlier writes are known
    O = scale ((exp(G) Q) S + P diag(b) Y)
    S' = exp(G_128) S + ((exp(Z) K)^T diag(b)) Y

b scales columns only, so it is never needed as a column: a token's scalars lie on the lanes, where they are cheap. The first
half of Y is solved before the second, with the inverses of the two diagonal blocks of 64.

Every stage runs over all heads before the next one starts: the heads are independent, and a stage of eight hides the
latency of one. What passes between stages lies in VMEM.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from pallas_kernels.inputs import base_two
from pallas_kernels.tpu import inverse, scores
from pallas_kernels.tpu.plan import Plan
from pallas_kernels.tpu.products import TILE, column, float32_product, lanes, product, rows, split, transposed

HALF = TILE // 2
Ref = Any  # Pallas has no public type for references. None where a member or a call has no use for one


class Tokens(NamedTuple):
    """The inputs of a tile: refs `[128, heads * size]`; the scalars of all heads as rows `[kinds * heads, 128]`."""

    q: Ref
    k: Ref
    v: Ref
    erase: Ref
    g: Ref  # a gate per channel
    scalars: Ref  # beta; with a gate per head also g in base 2, exp(G), exp(Z)


class Prepared(NamedTuple):
    """What a tile needs besides the state; the leading axis counts value heads."""

    a: Ref  # A, float32 [heads, 128, 128]
    p: Ref  # P, float32 [heads, 128, 128]
    x: Ref  # the inverses of the two diagonal blocks of I + A diag(b), float32 [heads, 64, 128]
    keys: Ref  # ((exp(Z) K)^T diag(b)), [heads, key, 128]
    decay: Ref  # exp(G_i - G_j), a gate per head: float32 [heads, 128, 128]
    start: Ref  # exp(G), likewise, the same on all lanes
    erase_in: Ref  # exp(G) E, a gate per channel: [heads, 128, key]
    query_in: Ref  # exp(G) Q, likewise
    whole: Ref  # exp(G_128) as a row, likewise: float32 [heads, 8, key]
    factors: Ref  # likewise, for the backward: the factors of all levels, exp(G), exp(Z): float32 [heads, 9 * 128, key]


class Temporary(NamedTuple):
    """Scratch between the stages of `prepare`."""

    columns: Ref  # float32 [heads, 24, 8, 128]
    base: Ref  # float32 [heads, 16, 128]
    right: Ref  # float32 [pairs of heads, 32, 128]
    merged: Ref  # float32 [heads, 32, 128]
    before: Ref  # float32 [heads, 128, key]
    after: Ref  # float32 [heads, 128, key]


def operand(plan: Plan) -> jnp.dtype:
    """The dtype of what is only ever an operand of a product."""
    return jnp.dtype(jnp.float32 if plan.exact else jnp.bfloat16)


def prepared_shapes(plan: Plan, tiles: int = 0) -> Prepared:
    """VMEM for one tile, or for `tiles` of them along a first axis."""

    def vmem(*shape: int, dtype: DTypeLike = jnp.float32) -> object:
        return pltpu.VMEM((tiles,) * (tiles > 0) + (plan.heads, *shape), dtype)

    channel, square = plan.gate == "channel", (TILE, TILE)
    decayed = vmem(TILE, plan.key, dtype=operand(plan)) if channel else None
    return Prepared(
        a=vmem(*square) if plan.erases else None,
        p=vmem(*square),
        x=vmem(HALF, TILE) if plan.erases and not tiles else None,
        keys=vmem(plan.key, TILE, dtype=operand(plan)),
        decay=vmem(*square) if plan.gate == "head" else None,
        start=vmem(*square) if plan.gate == "head" else None,
        erase_in=decayed if plan.erases else None,
        query_in=decayed,
        whole=vmem(8, plan.key) if channel else None,
        factors=vmem((len(scores.BLOCKS) + 2) * TILE, plan.key) if channel and tiles else None,
    )


def temporary_shapes(plan: Plan, *, inverts: bool) -> Temporary:
    def vmem(count: int, *shape: int) -> object:
        return pltpu.VMEM((count, *shape), jnp.float32)

    sums = vmem(plan.heads, TILE, plan.key) if plan.gate == "channel" else None
    if not inverts:
        return Temporary(None, None, None, None, sums, sums)
    return Temporary(
        vmem(plan.heads, 24, 8, TILE),
        vmem(plan.heads, inverse.BASE, TILE),
        vmem(-(-plan.heads // 2), 32, TILE),
        vmem(plan.heads, 32, TILE),
        sums,
        sums,
    )


def key_of(plan: Plan, head: int) -> int:
    return head // plan.per_key


def of_key(plan: Plan, ref: Ref, head: int) -> Array:
    """The query or key of a value head, `[128, key]`."""
    return of_head(ref, key_of(plan, head), plan.key)


def erase_of(plan: Plan, tokens: Tokens, head: int) -> Array:
    """The erase key of a value head, `[128, key]`."""
    if tokens.erase is None:
        return of_key(plan, tokens.k, head)
    return of_head(tokens.erase, head * plan.erase_heads // plan.heads, plan.key)


def of_head(ref: Ref, head: int, size: int) -> Array:
    return ref[:, head * size : (head + 1) * size]


def scalar_row(plan: Plan, tokens: Tokens, kind: int, head: int) -> Array:
    """A token scalar of a head, `[1, 128]`."""
    return tokens.scalars[pl.ds(kind * plan.heads + head, 1)]


BETA, GATE, START, END = range(4)


def start_columns(plan: Plan, tokens: Tokens) -> Array:
    """exp(G) of every head as columns, `[128, >= heads]`."""
    return transposed(tokens.scalars[START * plan.heads : (START + 1) * plan.heads])


def prepare(plan: Plan, tokens: Tokens, done: Prepared, temporary: Temporary) -> Array | None:
    """Fills `done` for one tile, but for the inverses; returns whether the tile is steep, with a gate per channel."""
    if plan.gate == "channel":
        return _channel_scores(plan, tokens, done, temporary)
    _head_scores(plan, tokens, done)
    return None


def _head_scores(plan: Plan, tokens: Tokens, done: Prepared) -> None:
    lower = rows(TILE, TILE) >= lanes(TILE, TILE)
    if done.decay is not None:
        columns = start_columns(plan, tokens)
        for h in range(plan.heads):
            done.start[h] = column(columns, h, TILE)
            done.decay[h] = scores.pair_decay(scalar_row(plan, tokens, GATE, h), plan.exact)

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
    for j in range(plan.key_heads):
        k = transposed(of_head(tokens.k, j, plan.key)).astype(jnp.float32)
        for h in range(j * plan.per_key, (j + 1) * plan.per_key):
            scale = scalar_row(plan, tokens, BETA, h)
            if plan.gate == "head":
                scale = scale * scalar_row(plan, tokens, END, h)
            done.keys[h] = (k * scale).astype(done.keys.dtype)


def _channel_scores(plan: Plan, tokens: Tokens, done: Prepared, temporary: Temporary) -> Array:
    before, after, f32 = temporary.before, temporary.after, jnp.float32

    def key(h: int) -> Array:
        return of_key(plan, tokens.k, h).astype(f32)

    def query(h: int) -> Array:
        return of_key(plan, tokens.q, h).astype(f32)

    def gate(h: int) -> Array:
        return base_two(of_head(tokens.g, h, plan.key))

    def level(block: int) -> None:
        n = scores.BLOCKS.index(block)
        for h in range(plan.heads):
            factor = scores.level_factor(before[h], after[h], block)
            if done.factors is not None:
                done.factors[h, n * TILE : (n + 1) * TILE] = factor
            keys = key(h) * factor
            reads = [scores.right_rows(query(h), block) * scores.right_rows(factor, block)]
            if done.a is not None:
                erase = scores.right_rows(keys, block)
                if plan.erase_heads:
                    erase = scores.right_rows(erase_of(plan, tokens, h).astype(f32), block)
                    erase = erase * scores.right_rows(factor, block)
                reads.append(erase)
            part = product(jnp.concatenate(reads, 0), keys, plan.exact, transpose_b=True)
            _place(done.p, h, block, part)
            if done.a is not None:
                _place(done.a, h, block, part[len(erase) :])
        for h in range(plan.heads):
            before[h], after[h] = scores.next_level(before[h], after[h], block)

    def steep() -> None:
        diagonal = rows(TILE, TILE) == lanes(TILE, TILE)
        for h in range(plan.heads):
            own = product(query(h), key(h), plan.exact, transpose_b=True)
            done.p[h] = jnp.where(diagonal, own, 0.0)
            if done.a is not None:
                done.a[h] = jnp.zeros((TILE, TILE), f32)
            before[h], after[h] = gate(h), jnp.zeros((TILE, plan.key), f32)
        for block in scores.BLOCKS[:4]:
            level(block)

    def gentle() -> None:
        near, earlier = scores.near(), scores.near(earlier=True)
        for h in range(plan.heads):
            of_rows, of_keys = scores.near_factors(before[h], after[h])
            if done.factors is not None:
                done.factors[h, :TILE], done.factors[h, TILE : 2 * TILE] = of_rows, of_keys
            reads = [query(h) * of_rows]
            if done.a is not None:
                reads.append(erase_of(plan, tokens, h).astype(f32) * of_rows)
            part = product(jnp.concatenate(reads, 0), key(h) * of_keys, plan.exact, transpose_b=True)
            done.p[h] = jnp.where(near, part[:TILE], 0.0)
            if done.a is not None:
                done.a[h] = jnp.where(earlier, part[TILE:], 0.0)
        for h in range(plan.heads):
            before[h], after[h] = scores.next_level(before[h], after[h], 8)

    for h in range(plan.heads):
        before[h], after[h] = scores.near_sums(gate(h))
    is_steep = scores.steep([before[h] for h in range(plan.heads)], plan.exact)
    if_steep(plan, is_steep, steep, gentle)
    for block in scores.BLOCKS[4:]:
        level(block)
    for h in range(plan.heads):
        start, end = jnp.exp2(before[h]), jnp.exp2(after[h])
        if done.factors is not None:
            done.factors[h, -2 * TILE : -TILE], done.factors[h, -TILE:] = start, end
        keys = transposed((key(h) * end).astype(done.keys.dtype)).astype(f32)
        done.keys[h] = (keys * scalar_row(plan, tokens, BETA, h)).astype(done.keys.dtype)
        done.whole[h] = jnp.broadcast_to(start[TILE - 1 :], done.whole.shape[-2:])
        done.query_in[h] = (query(h) * start).astype(done.query_in.dtype)
        if done.erase_in is not None:
            done.erase_in[h] = (erase_of(plan, tokens, h).astype(f32) * start).astype(done.erase_in.dtype)
    return is_steep


def if_steep(plan: Plan, steep: Array, then: Callable[[], None], otherwise: Callable[[], None]) -> None:
    """Runs one of two stages."""
    if plan.only_steep is not False:
        pl.when(steep)(then)
    if plan.only_steep is not True:
        pl.when(jnp.logical_not(steep))(otherwise)


def _place(ref: Ref, head: int, block: int, part: Array) -> None:
    """Puts a level's scores, of its `right_rows`, where they belong."""
    meets = scores.meets(block)
    for here, there in scores.right_pieces(block):
        pltpu.store(ref.at[head, there], part[here], mask=meets[here])


def invert(plan: Plan, tokens: Tokens, done: Prepared, temporary: Temporary) -> None:
    """Fills `done.x`."""

    def blocks(h: int, size: int, period: int, offset: int) -> Array:
        """The blocks at rows n * period + offset and the lanes of n, side by side, times beta."""
        lane, result = lanes(size, TILE) // period, done.a[h, offset : offset + size]
        for n in range(1, TILE // period):
            result = jnp.where(lane == n, done.a[h, n * period + offset : n * period + offset + size], result)
        return result * scalar_row(plan, tokens, BETA, h)

    for h in range(plan.heads):
        inverse.base_columns(blocks(h, 16, 16, 0), temporary.columns.at[h])
    for h in range(plan.heads):
        top, bottom = inverse.invert_base(temporary.columns.at[h])
        temporary.base[h, :8], temporary.base[h, 8:] = top, bottom
    pairs = [(h, min(h + 1, plan.heads - 1)) for h in range(0, plan.heads, 2)]
    for size, source in ((16, temporary.base), (32, temporary.merged)):
        for n, (first, second) in enumerate(pairs):
            corners = [blocks(h, size, 2 * size, size) for h in (first, second)]
            right = inverse.merge_right(source[first], source[second], corners[0], corners[1], plan.exact)
            temporary.right[n, :size] = right
        for n, (first, second) in enumerate(pairs):
            right = temporary.right[n, :size]
            merged = inverse.merge_left(source[first], source[second], right, plan.exact)
            for h, x in zip((first, second), merged, strict=True):
                if size == 16:
                    temporary.merged[h] = x
                else:
                    done.x[h] = x


def solve_product(plan: Plan, a: Array, b: Array) -> Array:
    """A product of the triangular solve, float32 whatever the inputs: with eigenvalues below zero its sums cancel."""
    return float32_product(a, (b,) if plan.exact else split(b))


def carry(plan: Plan, tokens: Tokens, done: Prepared, state: Ref, new: Ref, y: Ref, reads: Ref, out: Ref) -> None:
    """Carries the states of all heads, float32 `[heads, key, value]`, through one tile and leaves Y in `y`.

    `new` (float32) and `y` are `[heads, 128, value]`; with `out`, `[128, heads * value]`, and `reads` (as `new`) the tile's
    outputs are written too.
    """
    columns = start_columns(plan, tokens) if plan.gate == "head" else None
    value = plan.value

    def decayed(known: Array, h: int) -> Array:
        """What a state read gives once the state has decayed up to each token."""
        if done.start is None:
            return known
        return known * jnp.concatenate([done.start[h]] * -(-value // TILE), 1)[:, :value]

    for h in range(plan.heads):
        old = state[h].astype(operand(plan))
        read = []
        if plan.erases:
            read.append(erase_of(plan, tokens, h) if done.erase_in is None else done.erase_in[h])
        if out is not None:
            q = of_key(plan, tokens.q, h)
            read.append(q if done.query_in is None else done.query_in[h])
        if read:
            known = product(jnp.concatenate(read, 0), old, plan.exact)
        if plan.erases:
            new[h] = of_head(tokens.v, h, value).astype(jnp.float32) - decayed(known[:TILE], h)
        else:
            y[h] = of_head(tokens.v, h, value).astype(y.dtype)
        if out is not None:
            reads[h] = decayed(known[-TILE:], h)
    if plan.erases:
        for h in range(plan.heads):
            new[h, :HALF] = solve_product(plan, done.x[h][:, :HALF], new[h, :HALF])
        for h in range(plan.heads):
            corner = (done.a[h, HALF:] * scalar_row(plan, tokens, BETA, h))[:, :HALF]
            new[h, HALF:] = new[h, HALF:] - solve_product(plan, corner, new[h, :HALF])
        for h in range(plan.heads):
            new[h, HALF:] = solve_product(plan, done.x[h][:, HALF:], new[h, HALF:])
        for h in range(plan.heads):
            y[h] = new[h].astype(y.dtype)
    for h in range(plan.heads):
        if out is not None:
            weights = (done.p[h] * scalar_row(plan, tokens, BETA, h)).astype(y.dtype)
            o = (reads[h] + product(weights, y[h], plan.exact)) * plan.scale
            out[:, h * value : (h + 1) * value] = o.astype(out.dtype)
        old = state[h]
        if columns is not None:
            old = old * jnp.broadcast_to(columns[TILE - 1 :, h : h + 1], (1, value))
        elif done.whole is not None:
            old = old * column(transposed(done.whole[h]), 0, value)
        state[h] = old + product(done.keys[h], y[h], plan.exact)
