"""The forward: states stay in VMEM while the tiles of all tokens pass.

The kernel's grid is (batch, programs, groups): a step handles `plan.heads` value heads of a group of `plan.group` tiles, and
groups run one after another. What the backward kernel has in common with it, the blocks of a grid step, is here too.

With the symbols of `delta_jax.ops.chunkwise`, b = beta and G, Z the sums of the gates up to and after a token, of one tile:

    A_ij = sum_d e_i k_j exp(G_i - G_j)   (i > j)        P_ij = sum_d q_i k_j exp(G_i - G_j)   (i >= j)
    B = V - (exp(G) E) S                                 what the state does not know yet
    (I + A diag(b)) Y = B                                what is left of it once the earlier writes are known
    O = scale ((exp(G) Q) S + P diag(b) Y)
    S' = exp(G_128) S + ((exp(Z) K)^T diag(b)) Y

b scales columns only, so it is never needed as a column: a token's scalars lie on the lanes, where they are cheap. The first
half of Y is solved before the second, with the inverses of the two diagonal blocks of 64.

Every stage runs over all heads before the next one starts: the heads are independent, and a stage of eight hides the
latency of one. What passes between stages lies in VMEM (`pallas_kernels.tpu.tile` has the shapes).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from pallas_kernels.tpu import inverse, scores
from pallas_kernels.tpu.forward_channel import channel_scores
from pallas_kernels.tpu.plan import Plan, vmem_bytes
from pallas_kernels.tpu.products import TILE, column, float32_product, lanes, product, rows, split, transposed
from pallas_kernels.tpu.tile import (
    BETA,
    END,
    GATE,
    HALF,
    Prepared,
    Ref,
    TileScratch,
    Tokens,
    erase_of,
    of_head,
    of_key,
    operand,
    prepared_shapes,
    scalar_row,
    start_columns,
    start_of,
    tile_scratch_shapes,
)


class Kept(NamedTuple):
    """What the forward leaves of every tile for the backward: arrays, or their references, shapes or blocks.

    Without erasing Y is V, and nothing is inverted. In bfloat16 a token and head takes `key * value / 64 + 2 * value + 256`
    bytes, 768 of 128 x 128. To carry the states once more in the backward would take half, and a fifth of its time.
    """

    states: Ref  # before the tile, as operands, [batch, heads, tiles, key, value]
    y: Ref  # Y, likewise, [batch, heads, tiles, 128, value]
    inverses: Ref  # `Prepared.x`, float32 [batch, heads, tiles, 64, 128]


class ForwardScratch(NamedTuple):
    prepared: Prepared
    tile: TileScratch
    solve: Ref  # B, and solved in place Y, float32 [heads, 128, value]
    y: Ref  # Y as an operand, likewise
    reads: Ref  # (exp(G) Q) S, float32 likewise


def tokens_specs(plan: Plan, time: Callable[[Array], Array] = lambda t: t) -> Tokens:
    """The blocks of the inputs of a grid step, `[1, group * 128, heads * size]`; of scalars `[1, 1, group, rows, 128]`.

    `time` maps the last grid index to a group of tiles.
    """

    def tokens(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, plan.group * TILE, width), lambda b, h, t: (b, time(t), h))

    kinds = 4 if plan.gate == "head" else 1
    return Tokens(
        q=tokens(plan.key_heads * plan.key),
        k=tokens(plan.key_heads * plan.key),
        v=tokens(plan.heads * plan.value),
        erase=tokens(plan.erase_heads * plan.key) if plan.erase_heads else None,
        g=tokens(plan.heads * plan.key) if plan.gate == "channel" else None,
        scalars=pl.BlockSpec((1, 1, plan.group, kinds * plan.heads, TILE), lambda b, h, t: (b, h, time(t), 0, 0)),
    )


def bytes_of(shapes: object) -> int:
    """Bytes of a tree of VMEM shapes, lanes filled up."""
    return sum(
        math.prod(x.shape[:-1]) * -(-x.shape[-1] // TILE) * TILE * jnp.dtype(x.dtype).itemsize
        for x in jax.tree.leaves(shapes)
    )


def tokens_bytes(plan: Plan) -> int:
    """Bytes of the blocks of the inputs of a grid step."""
    operands = (2 * plan.key_heads + plan.erase_heads) * plan.key + plan.heads * plan.value
    gates = plan.heads * plan.key * 4 * (plan.gate == "channel")
    return plan.group * TILE * (operands * operand(plan).itemsize + gates + 16 * plan.heads)


def of_tile(tokens: Tokens, index: Array) -> Tokens:
    """The refs of one tile of a grid step's blocks."""
    start = pl.multiple_of(index * TILE, TILE)

    def part(ref: Ref) -> Ref:
        return ref.at[0, pl.ds(start, TILE)]

    return jax.tree.map(part, tokens._replace(scalars=None))._replace(scalars=tokens.scalars.at[0, 0, index])


def held[T](shapes: T) -> T:
    """Scratch for `in_memory`: every shape with a first axis of one."""
    return jax.tree.map(lambda x: pltpu.VMEM((1, *x.shape), x.dtype), shapes)


def in_memory[T](scratch: T, index: Array) -> T:
    """The scratch of `held`, addressed by a number the compiler does not see through, a loop's `index` cut to zero.

    Scratch at fixed addresses is promoted to registers, of which there are not nearly enough: it would spill.
    """
    return jax.tree.map(lambda ref: ref.at[jnp.minimum(index, 0)], scratch)


def state_spec(plan: Plan) -> pl.BlockSpec:
    return pl.BlockSpec((1, plan.heads, plan.key, plan.value), lambda b, h, t: (b, h, 0, 0))


def _kept_of(plan: Plan, make: Callable[[tuple[int, int], DTypeLike], Any]) -> Kept:
    """`make(shape, dtype)` for each kind of what is kept, of the matrix of a tile and head."""
    return Kept(
        make((plan.key, plan.value), operand(plan)),
        make((TILE, plan.value), operand(plan)) if plan.erases else None,
        make((HALF, TILE), jnp.float32) if plan.erases else None,
    )


def kept_specs(plan: Plan, time: Callable[[Array], Array] = lambda t: t) -> Kept:
    """The blocks of a grid step; `time` as in `tokens_specs`."""

    def spec(shape: tuple[int, int], _: DTypeLike) -> pl.BlockSpec:
        return pl.BlockSpec((1, plan.heads, plan.group, *shape), lambda b, h, t: (b, h, time(t), 0, 0))

    return _kept_of(plan, spec)


def kept_bytes(plan: Plan) -> int:
    """Bytes of the blocks of `kept_specs`."""
    return plan.group * bytes_of(_kept_of(plan, lambda shape, dtype: pltpu.VMEM((plan.heads, *shape), dtype)))


def _scratch_shapes(plan: Plan) -> ForwardScratch:
    wide = pltpu.VMEM((plan.heads, TILE, plan.value), jnp.float32)
    y = pltpu.VMEM(wide.shape, operand(plan))
    return ForwardScratch(
        prepared_shapes(plan, inverts=True), tile_scratch_shapes(plan, inverts=plan.erases), wide, y, wide
    )


def forward_bytes(plan: Plan) -> int:
    """VMEM that `forward` needs: its scratch, and its blocks twice."""
    states = 2 * plan.heads * plan.key * plan.value * 4
    outputs = plan.group * TILE * plan.heads * plan.value * operand(plan).itemsize
    return bytes_of(_scratch_shapes(plan)) + 2 * (tokens_bytes(plan) + outputs + states + kept_bytes(plan))


def forward(plan: Plan, tokens: Tokens, initial_state: Array | None, keep: bool) -> tuple[Array, Array, Kept | None]:
    """Outputs `[batch, time, heads * value]`, final states, and what the backward wants if it is to be kept.

    `tokens` holds whole arrays, as `[batch, time, heads * size]`; `scalars` is `[batch, programs, tiles, kinds, 128]`.
    """
    heads = plan.programs * plan.heads
    square = (heads, plan.key, plan.value)

    def body(tokens: Tokens, first: Ref, out: Ref, state: Ref, kept: Kept | None, scratch: ForwardScratch) -> None:
        @pl.when(pl.program_id(2) == 0)
        def _() -> None:
            state[0] = jnp.zeros(state.shape[1:], state.dtype) if first is None else first[0]

        @pl.loop(0, plan.group)
        def _(index: Array) -> None:
            tile, here = of_tile(tokens, index), in_memory(scratch, index)
            before, done = None, here.prepared
            if kept is not None:
                left = jax.tree.map(lambda ref: ref.at[0, :, index], kept)
                before = left.states
                if plan.erases:
                    done, here = done._replace(x=left.inverses), here._replace(y=left.y)
            prepare(plan, tile, done, here.tile)
            if plan.erases:
                invert(plan, tile, done, here.tile)
            tile_out = out.at[0, pl.ds(pl.multiple_of(index * TILE, TILE), TILE)]
            _carry(plan, tile, done, state.at[0], before, here, tile_out)

    time = plan.tiles * TILE
    f32 = jnp.float32
    kept_shapes = _kept_of(
        plan, lambda shape, dtype: jax.ShapeDtypeStruct((plan.batch, heads, plan.tiles, *shape), dtype)
    )
    return pl.pallas_call(
        body,
        grid=(plan.batch, plan.programs, plan.groups),
        in_specs=[tokens_specs(plan), None if initial_state is None else state_spec(plan)],
        out_specs=[tokens_specs(plan).v, state_spec(plan), kept_specs(plan) if keep else None],
        out_shape=[
            jax.ShapeDtypeStruct((plan.batch, time, heads * plan.value), tokens.v.dtype),
            jax.ShapeDtypeStruct((plan.batch, *square), f32),
            kept_shapes if keep else None,
        ],
        scratch_shapes=[held(_scratch_shapes(plan))],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=vmem_bytes()
        ),
        name="delta_rule_forward",
    )(tokens, initial_state)


def prepare(plan: Plan, tokens: Tokens, done: Prepared, scratch: TileScratch) -> Array | None:
    """Fills `done` for one tile, but for the inverses; returns whether the tile is steep, with a gate per channel."""
    if plan.gate == "channel":
        return channel_scores(plan, tokens, done, scratch)
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


def invert(plan: Plan, tokens: Tokens, done: Prepared, scratch: TileScratch) -> None:
    """Fills `done.x`, from `done.a`."""

    def blocks(h: int, size: int, period: int, offset: int) -> Array:
        """The blocks at rows n * period + offset and the lanes of n, side by side, times beta."""
        lane, result = lanes(size, TILE) // period, done.a[h, offset : offset + size]
        for n in range(1, TILE // period):
            result = jnp.where(lane == n, done.a[h, n * period + offset : n * period + offset + size], result)
        return result * scalar_row(plan, tokens, BETA, h)

    for h in range(plan.heads):
        inverse.base_columns(blocks(h, 16, 16, 0), scratch.lower_columns.at[h], scratch.upper_columns.at[h])
    for h in range(plan.heads):
        top, bottom = inverse.invert_base(scratch.lower_columns.at[h], scratch.upper_columns.at[h])
        scratch.inverse_16[h, :8], scratch.inverse_16[h, 8:] = top, bottom
    pairs = [(h, min(h + 1, plan.heads - 1)) for h in range(0, plan.heads, 2)]
    for size, source, merged in ((16, scratch.inverse_16, scratch.inverse_32), (32, scratch.inverse_32, done.x)):
        for n, (first, second) in enumerate(pairs):
            corners = [blocks(h, size, 2 * size, size) for h in (first, second)]
            right = inverse.merge_right(source[first], source[second], corners[0], corners[1], plan.exact)
            scratch.crossing[n, :size] = right
        for n, (first, second) in enumerate(pairs):
            right = scratch.crossing[n, :size]
            merged[first], merged[second] = inverse.merge_left(source[first], source[second], right, plan.exact)


def solve_product(plan: Plan, a: Array, b: Array) -> Array:
    """A product of the triangular solve, float32 whatever the inputs: with eigenvalues below zero its sums cancel."""
    return float32_product(a, (b,) if plan.exact else split(b))


def _carry(
    plan: Plan, tokens: Tokens, done: Prepared, state: Ref, before: Ref, scratch: ForwardScratch, out: Ref
) -> None:
    """Carries the states of all heads, float32 `[heads, key, value]`, through one tile, and writes its outputs.

    `out` is `[128, heads * value]`. B is solved in place; Y is left in `scratch.y`, and the states in `before`, if given.
    """
    columns = start_columns(plan, tokens) if plan.gate == "head" else None
    value, solve, y = plan.value, scratch.solve, scratch.y

    def decayed(known: Array, h: int) -> Array:
        """What a state read gives once the state has decayed up to each token."""
        return known if done.start is None else known * start_of(done, h, value)

    for h in range(plan.heads):
        old = state[h].astype(operand(plan))
        if before is not None:
            before[h] = old
        read = [of_key(plan, tokens.q, h) if done.query_in is None else done.query_in[h]]
        if plan.erases:
            read.append(erase_of(plan, tokens, h) if done.erase_in is None else done.erase_in[h])
        known = product(jnp.concatenate(read, 0), old, plan.exact)
        scratch.reads[h] = decayed(known[:TILE], h)
        if plan.erases:
            solve[h] = of_head(tokens.v, h, value).astype(jnp.float32) - decayed(known[TILE:], h)
        else:
            y[h] = of_head(tokens.v, h, value).astype(y.dtype)
    if plan.erases:
        for h in range(plan.heads):
            solve[h, :HALF] = solve_product(plan, done.x[h][:, :HALF], solve[h, :HALF])
        for h in range(plan.heads):
            corner = (done.a[h, HALF:] * scalar_row(plan, tokens, BETA, h))[:, :HALF]
            solve[h, HALF:] = solve[h, HALF:] - solve_product(plan, corner, solve[h, :HALF])
        for h in range(plan.heads):
            solve[h, HALF:] = solve_product(plan, done.x[h][:, HALF:], solve[h, HALF:])
        for h in range(plan.heads):
            y[h] = solve[h].astype(y.dtype)
    for h in range(plan.heads):
        weights = (done.p[h] * scalar_row(plan, tokens, BETA, h)).astype(y.dtype)
        o = (scratch.reads[h] + product(weights, y[h], plan.exact)) * plan.scale
        out[:, h * value : (h + 1) * value] = o.astype(out.dtype)
        old = state[h]
        if columns is not None:
            old = old * jnp.broadcast_to(columns[TILE - 1 :, h : h + 1], (1, value))
        elif done.whole is not None:
            old = old * column(transposed(done.whole[h]), 0, value)
        state[h] = old + product(done.keys[h], y[h], plan.exact)
