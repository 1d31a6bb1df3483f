"""The forward kernel: states stay in VMEM while the tiles of all tokens pass."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu.plan import Plan, vmem_bytes
from pallas_kernels.tpu.products import TILE
from pallas_kernels.tpu.tile import (
    HALF,
    Prepared,
    Ref,
    Temporary,
    Tokens,
    carry,
    invert,
    operand,
    prepare,
    prepared_shapes,
    temporary_shapes,
)


class Kept(NamedTuple):
    """What the forward leaves for the backward: arrays, or their references, shapes or blocks."""

    states: Ref  # before every group of tiles, float32 [batch, heads, groups, key, value]
    inverses: Ref  # `Prepared.x` of every tile, float32 [batch, heads, tiles, 64, 128]


class Scratch(NamedTuple):
    prepared: Prepared
    temporary: Temporary
    new: Ref
    y: Ref
    reads: Ref


def tokens_specs(plan: Plan, time: Callable[[Array], Array] = lambda t: t) -> Tokens:
    """The blocks of the inputs of a grid step; `time` maps the last grid index to a group of tiles."""

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


def kept_specs(plan: Plan, time: Callable[[Array], Array] = lambda t: t) -> Kept:
    """The blocks of a grid step; `time` as in `tokens_specs`."""
    return Kept(
        pl.BlockSpec((1, plan.heads, 1, plan.key, plan.value), lambda b, h, t: (b, h, time(t), 0, 0)),
        pl.BlockSpec((1, plan.heads, plan.group, HALF, TILE), lambda b, h, t: (b, h, time(t), 0, 0))
        if plan.erases
        else None,
    )


def kept_bytes(plan: Plan) -> int:
    """Bytes of the blocks of `kept_specs`."""
    return 4 * plan.heads * (plan.key * plan.value + plan.group * HALF * TILE * plan.erases)


def _scratch_shapes(plan: Plan) -> Scratch:
    wide = pltpu.VMEM((plan.heads, TILE, plan.value), jnp.float32)
    y = pltpu.VMEM(wide.shape, operand(plan))
    return Scratch(prepared_shapes(plan), temporary_shapes(plan, inverts=plan.erases), wide, y, wide)


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

    def body(tokens: Tokens, first: Ref, out: Ref, state: Ref, kept: Kept | None, scratch: Scratch) -> None:
        @pl.when(pl.program_id(2) == 0)
        def _() -> None:
            state[0] = jnp.zeros(state.shape[1:], state.dtype) if first is None else first[0]

        if kept is not None:
            kept.states[0, :, 0] = state[0]

        @pl.loop(0, plan.group)
        def _(index: Array) -> None:
            tile, here = of_tile(tokens, index), in_memory(scratch, index)
            done = here.prepared
            if kept is not None and plan.erases:
                done = done._replace(x=kept.inverses.at[0, :, index])
            prepare(plan, tile, done, here.temporary)
            if plan.erases:
                invert(plan, tile, done, here.temporary)
            tile_out = out.at[0, pl.ds(pl.multiple_of(index * TILE, TILE), TILE)]
            carry(plan, tile, done, state.at[0], here.new, here.y, here.reads, tile_out)

    time = plan.tiles * TILE
    f32 = jnp.float32
    kept_shapes = Kept(
        jax.ShapeDtypeStruct((plan.batch, heads, plan.groups, plan.key, plan.value), f32),
        jax.ShapeDtypeStruct((plan.batch, heads, plan.tiles, HALF, TILE), f32) if plan.erases else None,
    )
    return pl.pallas_call(
        body,
        grid=(plan.batch, plan.programs, plan.groups),
        in_specs=[tokens_specs(plan), None if initial_state is None else state_spec(plan)],
        out_specs=[
            tokens_specs(plan).v,
            state_spec(plan),
            kept_specs(plan) if keep else None,
        ],
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
