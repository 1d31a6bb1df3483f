"""The sequential pass: a state stays in registers while all its chunks pass.

With the symbols of `pallas_kernels.gpu.prepare` and Z the sums of the gates of a chunk after a token:

    B = V - (exp(G) E) S                                 what the state does not know yet
    Y = X B                                              what is left of it once the earlier writes are known
    O = scale (exp(G) Q) S + P diag(b) Y
    S' = exp(G_64) S + (exp(Z) K)^T diag(b) Y

A program carries a block of the value's channels of one head, over a piece of the sequence, mostly all of it. One warpgroup
computes, another one fetches what the next chunks need; a chunk is a chain of three products, for the update waits for Y and
Y for what the state knows.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu.arrays import BETA, END, START, Prepared, Tokens, of_chunks, of_pieces, of_tokens, operands_of
from pallas_kernels.gpu.plan import CHUNK, SHARED_BYTES, Plan
from pallas_kernels.gpu.warpgroup import (
    Ref,
    along_rows,
    each_row,
    kernel,
    load,
    loaded,
    parts,
    place,
    product,
    products,
    put,
    put_split,
    read,
    shared,
    split_pairs,
    store,
    stored,
    turned,
    vectors,
    zeros,
)


class Inputs(NamedTuple):
    tokens: Tokens
    done: Prepared
    state: Ref  # before every piece, float32 [batch, heads, pieces, key, value], or None: zero


class Results(NamedTuple):
    """What the forward gives, the first two; or the backward wants to know again, the last two; or the ends of pieces."""

    o: Ref  # [batch, time, heads, value]
    state: Ref  # after every piece, float32 [batch, heads, pieces, key, value]
    states: Ref  # the state before every chunk, bfloat16 [batch, heads, chunks, key, value]
    y: Any  # Y in the plan's `parts`, bfloat16 [batch, time, heads, value] each


class Chunk(NamedTuple):
    """What a chunk needs: shared memory, or where it comes from."""

    q: Ref  # [64, key]
    k: Ref
    erase: Ref
    v: Ref  # [64, value_block]
    p: Ref  # [64, 64]
    x: Ref  # [2, 64, 64]
    scalars: Ref  # [kinds, 64]
    whole: Ref  # [key]


class Scratch(NamedTuple):
    ring: Any  # a `Chunk`, of several chunks
    full: Ref
    empty: Ref
    arrived: Ref
    edge: Ref  # the first and the last state, float32 [key, value_block]
    old: Ref  # the state, bfloat16 [parts, key, value_block]
    unknown: Ref  # B, split: [2, 64, value_block]
    writes: Ref  # diag(b) Y, and that times exp(Z), or that alone in two parts: [2, 64, value_block]
    out: Ref  # O, or the parts of Y: [parts, 64, value_block]


def chunk_shapes(plan: Plan, tokens: Tokens, stages: int, *, scores: bool) -> Chunk:
    """Shared memory for `stages` chunks; with queries and scores or without."""
    swizzle = 2 * plan.value_block

    def tile(*shape: int) -> Ref:
        return shared(stages, *shape, swizzle=swizzle)

    return Chunk(
        q=tile(CHUNK, plan.key) if scores else None,
        k=tile(CHUNK, plan.key),
        erase=tile(CHUNK, plan.key) if plan.own_erase else None,
        v=tile(CHUNK, plan.value_block),
        p=tile(CHUNK, CHUNK) if scores else None,
        x=tile(2, CHUNK, CHUNK) if plan.erases else None,
        scalars=vectors(stages, *tokens.scalars.shape[-2:]),
        whole=vectors(stages, plan.key) if plan.gate == "channel" else None,
    )


def bytes_of(shapes: object) -> int:
    return sum(math.prod(x.inner_aval.shape) * x.inner_aval.dtype.itemsize for x in jax.tree.leaves(shapes))


def stages_of(plan: Plan, chunk: Chunk, others: object) -> int:
    """How many chunks shared memory has room for, beside what else a program wants."""
    return min(4, plan.piece, (SHARED_BYTES - 4096 - bytes_of(others)) // bytes_of(chunk))


def fetch_all(
    plan: Plan, copies: Callable[[Array, Array], list[tuple[Ref, Ref]]], full: Ref, empty: Ref, stages: int
) -> None:
    """The fetching warpgroup: `copies(step, slot)` of every step, as soon as the slot is empty."""
    for step in range(stages):
        load(full.at[step], *copies(jnp.int32(step), jnp.int32(step)))

    @pl.loop(stages, plan.piece)
    def _(step: Array) -> None:
        slot = lax.rem(step, stages)
        plgpu.barrier_wait(empty.at[slot])
        load(full.at[slot], *copies(step, slot))

    for slot in range(stages):  # the interpreter of JAX 0.11 wants every arrival waited for
        plgpu.barrier_wait(empty.at[slot])


def copies_of(
    plan: Plan, inputs: Inputs, batch: Array, head: Array, block: Array, chunk: Array, ring: Chunk, slot: Array
) -> list[tuple[Ref, Ref]]:
    """The copies that bring a chunk into a slot of the ring."""
    now, here = pl.ds(chunk * CHUNK, CHUNK), (batch, head, chunk)
    keys = operands_of(plan, inputs.tokens, inputs.done, batch, head)
    values = pl.ds(block * plan.value_block, plan.value_block)
    sources = Chunk(
        q=keys.q.at[now],
        k=keys.k.at[now],
        erase=None if keys.erase is None else keys.erase.at[now],
        v=inputs.tokens.v.at[batch, now, head, values],
        p=inputs.done.p[0].at[here],
        x=None,
        scalars=inputs.tokens.scalars.at[here],
        whole=inputs.done.whole.at[here] if plan.gate == "channel" else None,
    )
    copies = [
        (source, target.at[slot])
        for source, target in zip(sources, ring, strict=True)
        if source is not None and target is not None
    ]
    if plan.erases:  # a copy has at most five dimensions, tiles included
        copies += [(inputs.done.x.at[(*here, part)], ring.x.at[slot, part]) for part in (0, 1)]
    return copies


def arrivals(chunk: Chunk) -> int:
    """How many copies bring a chunk."""
    return len(jax.tree.leaves(chunk)) + (chunk.x is not None)


def decayed_state(plan: Plan, here: Chunk, state: Array) -> Array:
    """exp(G_64) S."""
    if plan.gate == "head":
        return state * here.scalars[START, CHUNK - 1]
    if plan.gate == "channel":
        return state * each_row(along_rows(here.whole), plan.value_block)
    return state


def scan(
    plan: Plan, tokens: Tokens, done: Prepared, state: Array | None, *, want: Literal["outputs", "states", "ends"]
) -> Results:
    """Outputs and final states; or the states before every chunk and Y; or the states after every piece.

    The ends of pieces are joined to others: there the state is read, and written to, with operands of two parts.
    """
    block = plan.value_block
    outputs, states, ends = (want == name for name in ("outputs", "states", "ends"))

    def body(inputs: Inputs, results: Results, scratch: Scratch) -> None:
        which, head, piece, batch, warpgroup = place("block", "head", "piece", "batch", "warpgroup")
        channels, first_chunk = pl.ds(which * block, block), piece * plan.piece

        @pl.when(warpgroup == 1)
        def _() -> None:
            def copies(chunk: Array, slot: Array) -> list[tuple[Ref, Ref]]:
                return copies_of(plan, inputs, batch, head, which, first_chunk + chunk, scratch.ring, slot)

            fetch_all(plan, copies, scratch.full, scratch.empty, stages)

        def chunk(index: Array, state: Array) -> Array:
            slot, index = lax.rem(index, stages), first_chunk + index
            here = jax.tree.map(lambda ref: ref.at[slot], scratch.ring)
            now = (batch, pl.ds(index * CHUNK, CHUNK), head, channels)
            erase = here.k if here.erase is None else here.erase

            def scalar(kind: int) -> Array:
                return each_row(along_rows(here.scalars.at[kind]), block)

            stored()
            put_split(scratch.old, state)
            plgpu.commit_smem()
            loaded(scratch.full.at[slot])
            if states:
                store((scratch.old.at[0], results.states.at[batch, head, index, :, channels]))
            y = read(here.v)
            reading = [[(here.q, scratch.old.at[0])]] if outputs else []
            if plan.erases:
                known, *reads = products(split_pairs((erase,), scratch.old), *reading)
                put_split(scratch.unknown, y - (known * scalar(START) if plan.gate == "head" else known))
                plgpu.commit_smem()
                y = product(*split_pairs(here.x, scratch.unknown))
            else:
                reads = products(*reading) if reading else []
            new = y * scalar(BETA)
            written = [scratch.writes.at[1 if plan.gate == "head" else 0]]
            if ends:
                written = list(parts(scratch.writes))
                put_split(scratch.writes, new * scalar(END) if plan.gate == "head" else new)
            else:
                put(scratch.writes.at[0], new)
                if plan.gate == "head":
                    put(scratch.writes.at[1], new * scalar(END))
            if states:
                put_split(scratch.out, y)
                store(*((part, y.at[now]) for part, y in zip(parts(scratch.out), results.y, strict=True)))
            else:
                plgpu.commit_smem()
            among = [[(here.p, scratch.writes.at[0])]] if outputs else []
            update, *new_reads = products([(turned(here.k), part) for part in written], *among)
            state = decayed_state(plan, here, state) + update
            if outputs:
                known = reads[0] * scalar(START) if plan.gate == "head" else reads[0]
                known = known if plan.gate == "channel" else known * plan.scale
                put(scratch.out.at[0], known + new_reads[0])
                store((scratch.out.at[0], results.o.at[now]))
            plgpu.barrier_arrive(scratch.empty.at[slot])
            return state

        @pl.when(warpgroup == 0)
        def _() -> None:
            first = zeros(plan.key, block)
            if inputs.state is not None:
                load(scratch.arrived, (inputs.state.at[batch, head, piece, :, channels], scratch.edge))
                loaded(scratch.arrived)
                first = read(scratch.edge)
            last = lax.fori_loop(0, plan.piece, chunk, first)
            if not states:
                put(scratch.edge, last)
                store((scratch.edge, results.state.at[batch, head, piece, :, channels]))
            stored(and_written=True)

    one = chunk_shapes(plan, tokens, 1, scores=outputs)
    swizzle = 2 * block
    others = Scratch(
        ring=None,
        full=None,
        empty=None,
        arrived=None,
        edge=shared(plan.key, block, dtype=jnp.float32) if not states or state is not None else None,
        old=shared(1 + ends, plan.key, block, swizzle=swizzle),
        unknown=shared(2, CHUNK, block, swizzle=swizzle) if plan.erases else None,
        writes=shared(1 + (ends or plan.gate == "head"), CHUNK, block, swizzle=swizzle),
        out=None if ends else shared(plan.parts if states else 1, CHUNK, block, swizzle=swizzle),
    )
    stages = stages_of(plan, one, others)
    scratch = others._replace(
        ring=chunk_shapes(plan, tokens, stages, scores=outputs),
        full=plgpu.Barrier(num_arrivals=arrivals(one), num_barriers=stages),
        empty=plgpu.Barrier(num_barriers=stages),
        arrived=plgpu.Barrier() if state is not None else None,
    )
    results = Results(
        o=of_tokens(plan, plan.value) if outputs else None,
        state=of_pieces(plan) if not states else None,
        states=of_chunks(plan, plan.key, plan.value) if states else None,
        y=(of_tokens(plan, plan.value),) * plan.parts if states else None,
    )
    return kernel(
        body,
        Inputs(tokens, done, state),
        results,
        scratch,
        {"block": plan.value // block, "head": plan.heads, "piece": plan.pieces, "batch": plan.batch},
        {"outputs": "delta_rule_forward", "states": "delta_rule_states", "ends": "delta_rule_ends"}[want],
        warpgroups=2,
    )
