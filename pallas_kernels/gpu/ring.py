"""What a sequential pass reads: chunks of 64 tokens in a ring of shared memory.

A program of a pass has a block of the value's channels of one head, over a piece of the sequence, mostly all of it. On
Hopper one warpgroup fills the ring for another: the fetching one starts the copies of a chunk as soon as the slot is empty
that they go to; the computing one waits for the slot to be full, and says when it has done with it. Elsewhere the computing
warpgroup starts the copies itself, as soon as it turns to the chunk after the one whose slot they go to.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu.arrays import Prepared, Tokens, channels_of, operands_of, places_of
from pallas_kernels.gpu.plan import BLOCK, CHUNK, Plan
from pallas_kernels.gpu.warpgroup import Ref, load, loaded, place, shared, vectors


class PassInputs(NamedTuple):
    tokens: Tokens  # backwards with dO in the place of V
    done: Prepared
    state: Ref  # before every piece, or its cotangent after it, float32 [batch, heads, pieces, value, key]; None: zero


class PassProgram(NamedTuple):
    """Where a program is on the grid of a sequential pass."""

    channels: pl.Slice  # its block of the value's channels
    values: pl.Slice  # the same beside those of other heads
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
        return self.batch, pl.ds(chunk * CHUNK, CHUNK), self.values


def grid_of(plan: Plan) -> dict[str, int]:
    return {"block": plan.value // BLOCK, "head": plan.heads, "piece": plan.pieces, "batch": plan.batch}


def program(plan: Plan) -> PassProgram:
    block, head, piece, batch, warpgroup = place(*grid_of(plan), "warpgroup")
    values = channels_of(head, plan.value, block, BLOCK)
    return PassProgram(pl.ds(block * BLOCK, BLOCK), values, head, piece, batch, warpgroup)


class Chunk(NamedTuple):
    """What a chunk needs, as `Tokens`, `Operands` and `Prepared` of `arrays`: shared memory, or where it comes from."""

    q: Any  # [64, key] in the plan's `split`
    k: Any  # likewise
    erase: Any  # likewise; None where it is `k`
    v: Any  # [64, 64] likewise; backwards dO
    p: Any  # [64, 64] likewise
    x: Ref  # [2, 64, 64]
    scalars: Ref  # [kinds, 64]
    whole: Ref  # [key]

    @property
    def erase_key(self) -> Any:
        return self.k if self.erase is None else self.erase


class Ring(NamedTuple):
    chunks: Chunk  # of as many slots as its arrays have along their first axis
    full: Ref  # barriers, one a slot
    empty: Ref

    @property
    def slots(self) -> int:
        return self.chunks.scalars.shape[0]


def ring_shapes(plan: Plan, others: object, *, scores: bool) -> Ring:
    """Shared memory for as many chunks as there is room for, up to four, beside what else a program wants."""
    one = _chunk_shapes(plan, 1, scores=scores)
    # Threads that copy for themselves wait for all that they have begun.
    most = 4 if plan.machine.copies == "tma" else 2
    slots = min(most, plan.piece, (plan.machine.shared_bytes - 2048 - _bytes_of(others)) // _bytes_of(one))
    arrivals = len(jax.tree.leaves(one)) + (one.x is not None)  # X comes in two copies
    return Ring(
        chunks=_chunk_shapes(plan, slots, scores=scores),
        full=plgpu.Barrier(num_arrivals=arrivals, num_barriers=slots),
        empty=plgpu.Barrier(num_barriers=slots),
    )


def _chunk_shapes(plan: Plan, slots: int, *, scores: bool) -> Chunk:
    """With queries and scores or without."""

    def tile(*shape: int) -> Any:
        return (shared(slots, *shape),) * plan.split

    return Chunk(
        q=tile(CHUNK, plan.key) if scores else None,
        k=tile(CHUNK, plan.key),
        erase=tile(CHUNK, plan.key) if plan.own_erase else None,
        v=tile(CHUNK, BLOCK),
        p=tile(CHUNK, CHUNK) if scores else None,
        x=shared(slots, 2, CHUNK, CHUNK) if plan.erases else None,
        scalars=vectors(slots, plan.kinds, CHUNK),
        whole=vectors(slots, plan.key) if plan.gate == "channel" else None,
    )


def _bytes_of(shapes: object) -> int:
    return sum(math.prod(x.inner_aval.shape) * x.inner_aval.dtype.itemsize for x in jax.tree.leaves(shapes))


class Chunks(NamedTuple):
    """The chunks that a program goes over, `chunk_of(step)` one after another."""

    plan: Plan
    inputs: PassInputs
    at: PassProgram
    ring: Ring
    chunk_of: Callable[[Array], Array]

    def go_over(self, compute: Callable[[], None]) -> None:
        """Runs `compute`, which asks for every step with `arrived` and lets go of it with `done`."""
        if not self.plan.machine.fetching:
            for step in range(max(1, self.ring.slots - 1)):
                self._bring(jnp.int32(step))
            compute()
            return
        pl.when(self.at.warpgroup == 1)(self._fetch)
        pl.when(self.at.warpgroup == 0)(compute)

    def arrived(self, step: Array) -> Chunk:
        """The chunk of a step, as soon as it is there."""
        slot, slots = lax.rem(step, self.ring.slots), self.ring.slots
        if self.plan.machine.fetching or slots == 1:
            loaded(self.ring.full.at[slot])
        else:
            loaded(self.ring.full.at[slot], then=lambda: self._bring_if_any(step + slots - 1))
        return self.slot(step)

    def slot(self, step: Array) -> Chunk:
        """Where the chunk of a step will be."""
        return jax.tree.map(lambda ref: ref.at[lax.rem(step, self.ring.slots)], self.ring.chunks)

    def done(self, step: Array) -> None:
        """The chunk of a step is not needed any more."""
        if self.plan.machine.fetching:
            plgpu.barrier_arrive(self.ring.empty.at[lax.rem(step, self.ring.slots)])
        elif self.ring.slots == 1:
            self._bring_if_any(step + 1)

    def _bring(self, step: Array) -> None:
        slot = lax.rem(step, self.ring.slots)
        copies = _copies(self.plan, self.inputs, self.at, self.chunk_of(step), self.ring.chunks, slot)
        load(self.ring.full.at[slot], *copies)

    def _bring_if_any(self, step: Array) -> None:
        pl.when(step < self.plan.piece)(lambda: self._bring(step))

    def _fetch(self) -> None:
        """What the fetching warpgroup does: brings every chunk as soon as a slot is empty."""
        slots = self.ring.slots
        for step in range(slots):
            self._bring(jnp.int32(step))

        @pl.loop(slots, self.plan.piece)
        def _(step: Array) -> None:
            plgpu.barrier_wait(self.ring.empty.at[lax.rem(step, slots)])
            self._bring(step)

        for slot in range(slots):  # the interpreter of JAX 0.11 wants every arrival waited for
            plgpu.barrier_wait(self.ring.empty.at[slot])


def _copies(
    plan: Plan, inputs: PassInputs, at: PassProgram, chunk: Array, chunks: Chunk, slot: Array
) -> list[tuple[Ref, Ref]]:
    """The copies that bring a chunk into a slot."""
    now, here = pl.ds(chunk * CHUNK, CHUNK), (at.batch, at.head, chunk)
    keys = operands_of(plan, inputs.tokens, inputs.done, at.batch, at.head, now)
    sources = Chunk(
        q=keys.q,
        k=keys.k,
        erase=keys.erase,
        v=places_of(inputs.tokens.v, at.tokens(chunk)),
        p=places_of(inputs.done.p[: plan.split], here),
        x=None,
        scalars=inputs.tokens.scalars.at[here],
        whole=inputs.done.whole.at[here] if plan.gate == "channel" else None,
    )
    copies = [
        (source, places_of(target, slot))
        for source, target in zip(sources, chunks, strict=True)
        if source is not None and target is not None
    ]
    if plan.erases:  # a copy has at most five dimensions, tiles included
        copies += [(inputs.done.x.at[(*here, part)], chunks.x.at[slot, part]) for part in (0, 1)]
    return copies
