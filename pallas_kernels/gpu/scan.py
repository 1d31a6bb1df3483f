"""The sequential pass: a state stays in registers while all its chunks pass.

With the symbols of `pallas_kernels.gpu.prepare` and Z the sums of the gates of a chunk after a token:

    B = V - (exp(G) E) S                                 what the state does not know yet
    Y = X B                                              what is left of it once the earlier writes are known
    O = scale (exp(G) Q) S + P diag(b) Y
    S' = exp(G_64) S + (exp(Z) K)^T diag(b) Y

Programs and warpgroups share the work as `pallas_kernels.gpu.ring` says. A chunk is a chain of three products, for the
update waits for Y and Y for what the state knows.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu import warpgroup as wg
from pallas_kernels.gpu.arrays import BETA, END, START, Prepared, Tokens, of_chunks, of_pieces, of_tokens
from pallas_kernels.gpu.plan import CHUNK, Plan
from pallas_kernels.gpu.ring import Chunk, PassInputs, PassProgram, Ring, fetch, grid_of, program, ring_shapes
from pallas_kernels.gpu.warpgroup import Ref

Want = Literal["outputs", "states", "ends"]


class ScanResults(NamedTuple):
    """What the forward gives, the first two; or the backward wants to know again, the last two; or the ends of pieces."""

    o: Ref  # [batch, time, heads, value]
    state: Ref  # after every piece, float32 [batch, heads, pieces, key, value]
    states: Ref  # the state before every chunk, bfloat16 [batch, heads, chunks, key, value]
    y: Any  # Y in the plan's `parts`, bfloat16 [batch, time, heads, value] each


class ScanScratch(NamedTuple):
    ring: Ring
    arrived: Ref  # the barrier of the first state
    edge: Ref  # the first and the last state, float32 [key, value_block]
    old: Ref  # the state, bfloat16 [parts, key, value_block]
    unknown: Ref  # B, split: [2, 64, value_block]
    writes: Ref  # diag(b) Y, and that times exp(Z), or that alone in two parts: [2, 64, value_block]
    out: Ref  # O, or the parts of Y: [parts, 64, value_block]


def scan(plan: Plan, tokens: Tokens, done: Prepared, state: Array | None, *, want: Want) -> ScanResults:
    """Outputs and final states; or the states before every chunk and Y; or the states after every piece.

    `state` is that before every piece, float32 `[batch, heads, pieces, key, value]`, None for zero. The ends of pieces are
    joined to others: there the state is read, and written to, with operands of two parts.
    """
    outputs, states = want == "outputs", want == "states"

    def body(inputs: PassInputs, results: ScanResults, scratch: ScanScratch) -> None:
        at = program(plan)
        first_chunk, ring = at.piece * plan.piece, scratch.ring

        @pl.when(at.warpgroup == 1)
        def _() -> None:
            fetch(plan, inputs, at, ring, lambda step: first_chunk + step)

        def chunk(step: Array, state: Array) -> Array:
            slot, index = lax.rem(step, ring.slots), first_chunk + step
            return _chunk(plan, want, results, scratch, at, slot, index, state)

        @pl.when(at.warpgroup == 0)
        def _() -> None:
            first = wg.zeros(plan.key, plan.value_block)
            if inputs.state is not None:
                wg.load(scratch.arrived, (inputs.state.at[at.edge], scratch.edge))
                wg.loaded(scratch.arrived)
                first = wg.read(scratch.edge)
            last = lax.fori_loop(0, plan.piece, chunk, first)
            if not states:
                wg.put(scratch.edge, last)
                wg.store((scratch.edge, results.state.at[at.edge]))
            wg.stored(and_written=True)

    results = ScanResults(
        o=of_tokens(plan, plan.value) if outputs else None,
        state=of_pieces(plan) if not states else None,
        states=of_chunks(plan, plan.key, plan.value) if states else None,
        y=(of_tokens(plan, plan.value),) * plan.parts if states else None,
    )
    return wg.kernel(
        body,
        PassInputs(tokens, done, state),
        results,
        _scratch_shapes(plan, tokens, want, starts=state is not None),
        grid_of(plan),
        {"outputs": "delta_rule_forward", "states": "delta_rule_states", "ends": "delta_rule_ends"}[want],
        warpgroups=2,
    )


def _scratch_shapes(plan: Plan, tokens: Tokens, want: Want, *, starts: bool) -> ScanScratch:
    """With `starts` there is a state to begin with."""
    ends, states, block = want == "ends", want == "states", plan.value_block
    swizzle = 2 * block
    others: dict[str, Any] = {
        "edge": wg.shared(plan.key, block, dtype=jnp.float32) if not states or starts else None,
        "old": wg.shared(1 + ends, plan.key, block, swizzle=swizzle),
        "unknown": wg.shared(2, CHUNK, block, swizzle=swizzle) if plan.erases else None,
        "writes": wg.shared(1 + (ends or plan.gate == "head"), CHUNK, block, swizzle=swizzle),
        "out": None if ends else wg.shared(plan.parts if states else 1, CHUNK, block, swizzle=swizzle),
    }
    ring = ring_shapes(plan, tokens, others, scores=want == "outputs")
    return ScanScratch(ring=ring, arrived=plgpu.Barrier() if starts else None, **others)


def _chunk(
    plan: Plan,
    want: Want,
    results: ScanResults,
    scratch: ScanScratch,
    at: PassProgram,
    slot: Array,
    index: Array,
    state: Array,
) -> Array:
    """Carries the state, float32 `[key, value_block]`, through the chunk `index`, which arrives in a slot of the ring."""
    block = plan.value_block
    outputs, states, ends = (want == name for name in ("outputs", "states", "ends"))
    here = jax.tree.map(lambda ref: ref.at[slot], scratch.ring.chunks)
    now = at.tokens(index)

    def scalar(kind: int) -> Array:
        return wg.each_row(wg.along_rows(here.scalars.at[kind]), block)

    wg.stored()
    wg.put_split(scratch.old, state)
    plgpu.commit_smem()
    wg.loaded(scratch.ring.full.at[slot])
    if states:
        wg.store((scratch.old.at[0], results.states.at[at.batch, at.head, index, :, at.channels]))
    y = wg.read(here.v)
    reading = [[(here.q, scratch.old.at[0])]] if outputs else []
    if plan.erases:
        known, *reads = wg.products(wg.split_pairs((here.erase_key,), scratch.old), *reading)
        wg.put_split(scratch.unknown, y - (known * scalar(START) if plan.gate == "head" else known))
        plgpu.commit_smem()
        y = wg.product(*wg.split_pairs(here.x, scratch.unknown))
    else:
        reads = wg.products(*reading) if reading else []
    new = y * scalar(BETA)
    written = [scratch.writes.at[1 if plan.gate == "head" else 0]]
    if ends:
        written = list(wg.parts(scratch.writes))
        wg.put_split(scratch.writes, new * scalar(END) if plan.gate == "head" else new)
    else:
        wg.put(scratch.writes.at[0], new)
        if plan.gate == "head":
            wg.put(scratch.writes.at[1], new * scalar(END))
    if states:
        wg.put_split(scratch.out, y)
        wg.store(*((part, y.at[now]) for part, y in zip(wg.parts(scratch.out), results.y, strict=True)))
    else:
        plgpu.commit_smem()
    among = [[(here.p, scratch.writes.at[0])]] if outputs else []
    update, *new_reads = wg.products([(wg.turned(here.k), part) for part in written], *among)
    state = decayed_state(plan, here, state) + update
    if outputs:
        known = reads[0] * scalar(START) if plan.gate == "head" else reads[0]
        known = known if plan.gate == "channel" else known * plan.scale
        wg.put(scratch.out.at[0], known + new_reads[0])
        wg.store((scratch.out.at[0], results.o.at[now]))
    plgpu.barrier_arrive(scratch.ring.empty.at[slot])
    return state


def decayed_state(plan: Plan, here: Chunk, state: Array) -> Array:
    """exp(G_64) S."""
    if plan.gate == "head":
        return state * here.scalars[START, CHUNK - 1]
    if plan.gate == "channel":
        return state * wg.each_row(wg.along_rows(here.whole), plan.value_block)
    return state
