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
latency of one. What passes between stages lies in VMEM (`pallas_kernels.tpu.tile` has the shapes). The inverse is latency
throughout, so while the state passes one tile the next one is prepared, a head of the one and a head of the other in turns.
To that end the state's way begins with taking what was prepared to a place of its own; in every run of the kernel over a
sequence the first turn only prepares, and what it writes besides is written again or masked.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from pallas_kernels.tpu.plan import Plan, vmem_bytes
from pallas_kernels.tpu.prepare import complete, prepare
from pallas_kernels.tpu.products import TILE, column, float32_product, product, split, transposed
from pallas_kernels.tpu.tile import (
    BETA,
    HALF,
    Prepared,
    Ref,
    Stages,
    TileScratch,
    Tokens,
    erase_of,
    in_turns,
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


class Taken(NamedTuple):
    """What the state's way took of `Prepared`, which meanwhile is filled for the next tile."""

    weights: Ref  # P diag(b), an operand, [heads, 128, 128]
    keys: Ref  # `Prepared.keys`
    x: Ref  # `Prepared.x`
    corner: Ref  # the block of A diag(b) left below the two inverted ones, in the left half of float32 [heads, 64, 128]
    whole: Ref  # `Prepared.whole`


class ForwardScratch(NamedTuple):
    prepared: Prepared
    tile: TileScratch
    taken: Taken
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


def ahead_start(plan: Plan, t: Array) -> Array:
    """The tile at which the blocks of `ahead_specs` begin."""
    return jnp.minimum(t * plan.group, plan.tiles - _ahead_tiles(plan))


def _ahead_tiles(plan: Plan) -> int:
    """How many they hold."""
    return min(plan.group + plan.ahead, plan.tiles)


def ahead_specs(plan: Plan) -> Tokens:
    """As `tokens_specs`; but all that a tile is prepared from reaches as far as tiles are prepared ahead."""

    def reaching(spec: Any, axis: int) -> pl.BlockSpec:
        shape: list[Any] = list(spec.block_shape)
        a_tile = shape[axis] // plan.group

        def start(b: Array, h: Array | int, t: Array) -> tuple[Array, ...]:
            h = h if plan.programs > 1 else 0  # for a width that is no whole registers
            indices = spec.index_map(b, h, t)
            starts = [size * i for size, i in zip(spec.block_shape, indices, strict=True)]
            starts[axis] = a_tile * ahead_start(plan, t)
            return tuple(starts)

        shape[axis] = a_tile * _ahead_tiles(plan)
        return pl.BlockSpec(tuple(map(pl.Element, shape)), start)

    specs = tokens_specs(plan)
    tokens = jax.tree.map(lambda spec: reaching(spec, 1), specs._replace(v=None, scalars=None))
    return tokens._replace(v=specs.v, scalars=reaching(specs.scalars, 2))


def bytes_of(shapes: object) -> int:
    """Bytes of a tree of VMEM shapes, lanes filled up."""
    return sum(
        math.prod(x.shape[:-1]) * -(-x.shape[-1] // TILE) * TILE * jnp.dtype(x.dtype).itemsize
        for x in jax.tree.leaves(shapes)
    )


def tokens_bytes(plan: Plan, tiles: int) -> int:
    """Bytes of the blocks of the inputs of a grid step, with so many tiles of all but the values."""
    operands = (2 * plan.key_heads + plan.erase_heads) * plan.key * operand(plan).itemsize
    gates = plan.heads * plan.key * 4 * (plan.gate == "channel")
    values = plan.heads * plan.value * operand(plan).itemsize
    return TILE * (tiles * (operands + gates + 16 * plan.heads) + plan.group * values)


def of_tile(tokens: Tokens, index: Array) -> Tokens:
    """The refs of one tile of a grid step's blocks."""
    here = jax.tree.map(lambda ref: rows_of_tile(ref, index), tokens._replace(scalars=None))
    return here._replace(scalars=tokens.scalars.at[0, 0, index])


def rows_of_tile(ref: Ref, index: Array) -> Ref:
    """One tile of a block `[1, tiles * 128, width]`."""
    return ref.at[0, pl.ds(pl.multiple_of(index * TILE, TILE), TILE)]


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
    prepared, p = prepared_shapes(plan, inverts=True), pltpu.VMEM((plan.heads, TILE, TILE), operand(plan))
    taken = Taken(p, prepared.keys, prepared.x, prepared.x, prepared.whole)
    return ForwardScratch(prepared, tile_scratch_shapes(plan, inverts=plan.erases), taken, wide, y, wide)


def forward_bytes(plan: Plan) -> int:
    """VMEM that `forward` needs: its scratch, and its blocks twice."""
    states = 2 * plan.heads * plan.key * plan.value * 4
    tokens = tokens_bytes(plan, _ahead_tiles(plan))
    outputs = plan.group * TILE * plan.heads * plan.value * operand(plan).itemsize
    return bytes_of(_scratch_shapes(plan)) + 2 * (tokens + outputs + states + kept_bytes(plan))


def forward(plan: Plan, tokens: Tokens, initial_state: Array | None, keep: bool) -> tuple[Array, Array, Kept | None]:
    """Outputs `[batch, time, heads * value]`, final states, and what the backward wants if it is to be kept.

    `tokens` holds whole arrays, as `[batch, time, heads * size]`; `scalars` is `[batch, programs, tiles, kinds, 128]`.
    """
    heads = plan.programs * plan.heads
    square = (heads, plan.key, plan.value)

    def body(tokens: Tokens, first: Ref, out: Ref, state: Ref, kept: Kept | None, scratch: ForwardScratch) -> None:
        step = pl.program_id(2)

        @pl.when(step == 0)
        def _() -> None:
            state[0] = jnp.zeros(state.shape[1:], state.dtype) if first is None else first[0]

        def turn(index: Array) -> Array:
            own, here = jnp.maximum(index, 0), in_memory(scratch, index + plan.ahead)
            before = None
            if kept is not None:
                left = jax.tree.map(lambda ref: ref.at[0, :, own], kept)
                before = left.states
                if plan.erases:
                    here = here._replace(y=left.y, taken=here.taken._replace(x=left.inverses))

            def tile(ahead: int) -> Tokens:
                at = jnp.clip(step * plan.group + index + ahead, 0, plan.tiles - 1) - ahead_start(plan, step)
                return of_tile(tokens._replace(v=None), at)._replace(v=rows_of_tile(tokens.v, own))

            now, next_one = tile(0), tile(plan.ahead)
            reads = _read(plan, now, state.at[0], before, here)
            writes = _write(plan, now, state.at[0], here, rows_of_tile(out, own), live=index >= 0)
            prepares = prepare(plan, next_one, here.prepared, here.tile)
            completes = complete(plan, next_one, here.prepared, here.tile)
            if plan.ahead:
                in_turns(reads, prepares)
                in_turns(completes, writes)
            else:
                in_turns(itertools.chain(prepares, completes, reads, writes))
            return index + 1

        lax.while_loop(lambda index: index < plan.group, turn, jnp.where(step == 0, -plan.ahead, 0))

    time = plan.tiles * TILE
    f32 = jnp.float32
    kept_shapes = _kept_of(
        plan, lambda shape, dtype: jax.ShapeDtypeStruct((plan.batch, heads, plan.tiles, *shape), dtype)
    )
    return pl.pallas_call(
        body,
        grid=(plan.batch, plan.programs, plan.groups),
        in_specs=[ahead_specs(plan), None if initial_state is None else state_spec(plan)],
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


def solve_product(plan: Plan, a: Array, b: Array) -> Array:
    """A product of the triangular solve, float32 whatever the inputs: with eigenvalues below zero its sums cancel."""
    return float32_product(a, (b,) if plan.exact else split(b))


def _read(plan: Plan, tokens: Tokens, state: Ref, before: Ref, scratch: ForwardScratch) -> Stages[None]:
    """Takes what was prepared, and reads the states of all heads, float32 `[heads, key, value]`: B, or without erasing Y.

    The states are left in `before`, if given.
    """
    done, taken, value, y = scratch.prepared, scratch.taken, plan.value, scratch.y

    def decayed(known: Array, h: int) -> Array:
        """What a state read gives once the state has decayed up to each token."""
        return known if done.start is None else known * start_of(done, h, value)

    for h in range(plan.heads):
        beta = scalar_row(plan, tokens, BETA, h)
        taken.weights[h] = (done.p[h] * beta).astype(y.dtype)
        taken.keys[h] = done.keys[h]
        if plan.erases:
            taken.x[h], taken.corner[h] = done.x[h], done.a[h, HALF:] * beta
        if done.whole is not None:
            taken.whole[h] = done.whole[h]
        old = state[h].astype(operand(plan))
        if before is not None:
            before[h] = old
        read = [of_key(plan, tokens.q, h) if done.query_in is None else done.query_in[h]]
        if plan.erases:
            read.append(erase_of(plan, tokens, h) if done.erase_in is None else done.erase_in[h])
        known = product(jnp.concatenate(read, 0), old, plan.exact)
        scratch.reads[h] = decayed(known[:TILE], h)
        if plan.erases:
            scratch.solve[h] = of_head(tokens.v, h, value).astype(jnp.float32) - decayed(known[TILE:], h)
        else:
            y[h] = of_head(tokens.v, h, value).astype(y.dtype)
        yield


def _write(
    plan: Plan, tokens: Tokens, state: Ref, scratch: ForwardScratch, out: Ref, live: bool | Array
) -> Stages[None]:
    """Solves for Y in place of B, writes the outputs, `[128, heads * value]`, and, if `live`, the states after the tile.

    Y is left in `scratch.y`.
    """
    columns = start_columns(plan, tokens) if plan.gate == "head" else None
    taken, value, solve, y = scratch.taken, plan.value, scratch.solve, scratch.y
    if plan.erases:
        for h in range(plan.heads):
            solve[h, :HALF] = solve_product(plan, taken.x[h][:, :HALF], solve[h, :HALF])
            yield
        for h in range(plan.heads):
            solve[h, HALF:] = solve[h, HALF:] - solve_product(plan, taken.corner[h][:, :HALF], solve[h, :HALF])
            yield
        for h in range(plan.heads):
            solve[h, HALF:] = solve_product(plan, taken.x[h][:, HALF:], solve[h, HALF:])
            yield
        for h in range(plan.heads):
            y[h] = solve[h].astype(y.dtype)
    for h in range(plan.heads):
        o = (scratch.reads[h] + product(taken.weights[h], y[h], plan.exact)) * plan.scale
        out[:, h * value : (h + 1) * value] = o.astype(out.dtype)
        old = state[h]
        if columns is not None:
            old = old * jnp.broadcast_to(columns[TILE - 1 :, h : h + 1], (1, value))
        elif taken.whole is not None:
            old = old * column(transposed(taken.whole[h]), 0, value)
        new = old + product(taken.keys[h], y[h], plan.exact)
        for start in range(0, plan.key, value):  # the interpreter takes no mask that is higher than wide
            part = slice(start, min(start + value, plan.key))
            pltpu.store(state.at[h, part], new[part], mask=jnp.broadcast_to(live, new[part].shape))
        yield
