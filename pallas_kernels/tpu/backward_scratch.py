"""What the stages of the backward pass of a tile share: the scratch between them, and sums over heads that share a key."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from pallas_kernels.tpu import scores
from pallas_kernels.tpu.plan import Plan
from pallas_kernels.tpu.products import TILE
from pallas_kernels.tpu.tile import HALF, Prepared, Ref, Temporary, operand, prepared_shapes, temporary_shapes


class Stash(NamedTuple):
    """What the way forwards leaves for the way back, of every tile of a group; axes `[group, heads, ...]`."""

    prepared: Prepared
    states: Ref  # before the tile, [key, value]
    y: Ref  # [128, value]


class Scratch(NamedTuple):
    temporary: Temporary
    state: Ref  # float32 [heads, key, value]
    new: Ref  # float32 [heads, 128, value]: B forwards, dY and dB backwards
    d_o: Ref  # dO times the scale, an operand, [heads, 128, value]
    d_b: Ref  # dB likewise
    d_a: Ref  # dA and dP as operands, [heads, 128, 128]
    d_p: Ref
    raw_p: Ref  # float32, before masks, decays and beta
    raw_a: Ref
    d_reads: Ref  # float32 [heads, 128, key]
    d_writes: Ref
    scores_turned: Ref  # transposes of scores as operands: [heads, 128, 128 or 256]
    keys_turned: Ref  # [heads, 128, key]
    x_turned: Ref  # [heads, 128, 64]
    reads_turned: Ref  # [heads, key, 128 or 256]
    d_q: Ref  # float32 [key heads, 128, key]
    d_k: Ref
    d_erase: Ref
    terms: Ref  # a gate per channel: factor * d_factor of levels, reads and writes, as operands [heads, 9 * 128, key]
    near: Ref  # likewise: what pairs inside 16 tokens give to gates, float32 [heads, 128, key]
    whole: Ref  # likewise of the whole, [heads, 8, key]


def _vmem(*shape: int, dtype: DTypeLike = jnp.float32) -> object:
    return pltpu.VMEM(shape, dtype)


def stash_shapes(plan: Plan) -> Stash:
    return Stash(
        prepared_shapes(plan, plan.group),
        _vmem(plan.group, plan.heads, plan.key, plan.value, dtype=operand(plan)),
        _vmem(plan.group, plan.heads, TILE, plan.value, dtype=operand(plan)),
    )


def scratch_shapes(plan: Plan) -> Scratch:
    channel, reads = plan.gate == "channel", 1 + plan.erases
    return Scratch(
        temporary=temporary_shapes(plan, inverts=False),
        state=_vmem(plan.heads, plan.key, plan.value),
        new=_vmem(plan.heads, TILE, plan.value),
        d_o=_vmem(plan.heads, TILE, plan.value, dtype=operand(plan)),
        d_b=_vmem(plan.heads, TILE, plan.value, dtype=operand(plan)),
        d_a=_vmem(plan.heads, TILE, TILE, dtype=operand(plan)) if plan.erases else None,
        d_p=_vmem(plan.heads, TILE, TILE, dtype=operand(plan)),
        raw_p=_vmem(plan.heads, TILE, TILE),
        raw_a=_vmem(plan.heads, TILE, TILE) if plan.erases else None,
        d_reads=_vmem(plan.heads, TILE, plan.key),
        d_writes=_vmem(plan.heads, TILE, plan.key),
        scores_turned=_vmem(plan.heads, TILE, reads * TILE, dtype=operand(plan)),
        keys_turned=_vmem(plan.heads, TILE, plan.key, dtype=operand(plan)),
        x_turned=_vmem(plan.heads, TILE, HALF) if plan.erases else None,
        reads_turned=_vmem(plan.heads, plan.key, reads * TILE, dtype=operand(plan)),
        d_q=_vmem(plan.key_heads, TILE, plan.key),
        d_k=_vmem(plan.key_heads, TILE, plan.key),
        d_erase=_vmem(plan.erase_heads, TILE, plan.key) if plan.erase_heads else None,
        terms=_vmem(plan.heads, (len(scores.BLOCKS) + 2) * TILE, plan.key, dtype=operand(plan)) if channel else None,
        near=_vmem(plan.heads, TILE, plan.key) if channel else None,
        whole=_vmem(plan.heads, 8, plan.key) if channel else None,
    )


def reads_of(plan: Plan, query: Ref, erase: Ref, head: int) -> Array:
    """What belongs to the queries of a head and, below it, to its erase keys."""
    return jnp.concatenate([query[head], erase[head]], 0) if plan.erases else query[head]


def add(plan: Plan, ref: Ref, head: int, x: Array, *, start: bool = True, block: int = 1) -> None:
    """Adds what a value head gives to its key head (or erase head); with `start` the first of a key head overwrites.

    `x` holds the `right_rows` of a level.
    """
    index = head * ref.shape[0] // plan.heads
    first = start and head * ref.shape[0] % plan.heads == 0
    for here, there in scores.right_pieces(block):
        ref[index, there] = x[here] if first else ref[index, there] + x[here]


def add_erase(plan: Plan, scratch: Scratch, head: int, x: Array, *, start: bool, block: int = 1) -> None:
    """Adds to the cotangent of the erase key; where the write key erases, to that of the write key, never first."""
    if scratch.d_erase is None:
        add(plan, scratch.d_k, head, x, start=False, block=block)
    else:
        add(plan, scratch.d_erase, head, x, start=start, block=block)
