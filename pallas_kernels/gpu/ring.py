"""What a sequential pass reads: chunks of 64 tokens in a ring of shared memory, which one warpgroup fills for another.

A program of a pass has a block of the value's channels of one head, over a piece of the sequence, mostly all of it. The
fetching warpgroup starts the copies of a chunk as soon as the slot is empty that they go to; the computing one waits for the
slot to be full, and says when it has done with it.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu.arrays import Prepared, Tokens, operands_of
from pallas_kernels.gpu.plan import BLOCK, CHUNK, SHARED_BYTES, Plan
from pallas_kernels.gpu.warpgroup import Ref, load, place, shared, vectors


class PassInputs(NamedTuple):
    tokens: Tokens  # backwards with dO in the place of V
    done: Prepared
    state: Ref  # before every piece, or its cotangent after it, float32 [batch, heads, pieces, value, key]; None: zero


class PassProgram(NamedTuple):
    """Where a program is on the grid of a sequential pass."""

    channels: pl.Slice  # its block of the value's channels
    head: Array
    piece: Array
    batch: Array
    warpgroup: Array  # 0 computes, 1 fetches

    @property
    def edge(self) -> tuple[Any, ...]:
        """Where the state before or after the piece lies, turned."""
        return self.batch, self.head, self.piece, self.channels

    def tokens(self, chunk: Array) -> tuple[Any, ...]:
        """Where a chunk's values lie."""
        return self.batch, pl.ds(chunk * CHUNK, CHUNK), self.head, self.channels


def grid_of(plan: Plan) -> dict[str, int]:
    return {"block": plan.value // BLOCK, "head": plan.heads, "piece": plan.pieces, "batch": plan.batch}


def program(plan: Plan) -> PassProgram:
    block, head, piece, batch, warpgroup = place(*grid_of(plan), "warpgroup")
    return PassProgram(pl.ds(block * BLOCK, BLOCK), head, piece, batch, warpgroup)


class Chunk(NamedTuple):
    """What a chunk needs, as `Tokens`, `Operands` and `Prepared` of `arrays`: shared memory, or where it comes from."""

    q: Ref  # [64, key]
    k: Ref  # likewise
    erase: Ref  # likewise; None where it is `k`
    v: Ref  # [64, 64]; backwards dO
    p: Ref  # [64, 64]
    x: Ref  # [2, 64, 64]
    scalars: Ref  # [kinds, 64]
    whole: Ref  # [key]

    @property
    def erase_key(self) -> Ref:
        return self.k if self.erase is None else self.erase


class Ring(NamedTuple):
    chunks: Chunk  # of as many slots as its arrays have along their first axis
    full: Ref  # barriers, one a slot
    empty: Ref

    @property
    def slots(self) -> int:
        return self.chunks.scalars.shape[0]


def ring_shapes(plan: Plan, tokens: Tokens, others: object, *, scores: bool) -> Ring:
    """Shared memory for as many chunks as there is room for, up to four, beside what else a program wants."""
    one = _chunk_shapes(plan, tokens, 1, scores=scores)
    slots = min(4, plan.piece, (SHARED_BYTES - 4096 - _bytes_of(others)) // _bytes_of(one))
    arrivals = len(jax.tree.leaves(one)) + (one.x is not None)  # X comes in two copies
    return Ring(
        chunks=_chunk_shapes(plan, tokens, slots, scores=scores),
        full=plgpu.Barrier(num_arrivals=arrivals, num_barriers=slots),
        empty=plgpu.Barrier(num_barriers=slots),
    )


def _chunk_shapes(plan: Plan, tokens: Tokens, slots: int, *, scores: bool) -> Chunk:
    """With queries and scores or without."""

    def tile(*shape: int) -> Ref:
        return shared(slots, *shape)

    return Chunk(
        q=tile(CHUNK, plan.key) if scores else None,
        k=tile(CHUNK, plan.key),
        erase=tile(CHUNK, plan.key) if plan.own_erase else None,
        v=tile(CHUNK, BLOCK),
        p=tile(CHUNK, CHUNK) if scores else None,
        x=tile(2, CHUNK, CHUNK) if plan.erases else None,
        scalars=vectors(slots, *tokens.scalars.shape[-2:]),
        whole=vectors(slots, plan.key) if plan.gate == "channel" else None,
    )


def _bytes_of(shapes: object) -> int:
    return sum(math.prod(x.inner_aval.shape) * x.inner_aval.dtype.itemsize for x in jax.tree.leaves(shapes))


def fetch(plan: Plan, inputs: PassInputs, at: PassProgram, ring: Ring, chunk_of: Callable[[Array], Array]) -> None:
    """The fetching warpgroup: brings the chunk `chunk_of(step)` of every step, as soon as a slot is empty."""

    def bring(step: Array, slot: Array) -> None:
        load(ring.full.at[slot], *_copies(plan, inputs, at, chunk_of(step), ring.chunks, slot))

    for step in range(ring.slots):
        bring(jnp.int32(step), jnp.int32(step))

    @pl.loop(ring.slots, plan.piece)
    def _(step: Array) -> None:
        slot = lax.rem(step, ring.slots)
        plgpu.barrier_wait(ring.empty.at[slot])
        bring(step, slot)

    for slot in range(ring.slots):  # the interpreter of JAX 0.11 wants every arrival waited for
        plgpu.barrier_wait(ring.empty.at[slot])


def _copies(
    plan: Plan, inputs: PassInputs, at: PassProgram, chunk: Array, chunks: Chunk, slot: Array
) -> list[tuple[Ref, Ref]]:
    """The copies that bring a chunk into a slot."""
    now, here = pl.ds(chunk * CHUNK, CHUNK), (at.batch, at.head, chunk)
    keys = operands_of(plan, inputs.tokens, inputs.done, at.batch, at.head)
    sources = Chunk(
        q=keys.q.at[now],
        k=keys.k.at[now],
        erase=None if keys.erase is None else keys.erase.at[now],
        v=inputs.tokens.v.at[at.batch, now, at.head, at.channels],
        p=inputs.done.p[0].at[here],
        x=None,
        scalars=inputs.tokens.scalars.at[here],
        whole=inputs.done.whole.at[here] if plan.gate == "channel" else None,
    )
    copies = [
        (source, target.at[slot])
        for source, target in zip(sources, chunks, strict=True)
        if source is not None and target is not None
    ]
    if plan.erases:  # a copy has at most five dimensions, tiles included
        copies += [(inputs.done.x.at[(*here, part)], chunks.x.at[slot, part]) for part in (0, 1)]
    return copies
