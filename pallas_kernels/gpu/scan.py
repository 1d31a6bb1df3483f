"""The sequential pass: a state stays in registers while all its chunks pass.

With the symbols of `pallas_kernels.gpu.prepare` and Z the sums of the gates of a chunk after a token:

    B = V - (exp(G) E) S                                 what the state does not know yet
    Y = X B                                              what is left of it once the earlier writes are known
    O = scale (exp(G) Q) S + P diag(b) Y
    S' = exp(G_64) S + (exp(Z) K)^T diag(b) Y

Programs and warpgroups share the work as `pallas_kernels.gpu.ring` says. A chunk is a chain of three products, for the
update waits for Y and Y for what the state knows. The state and all that follows from it are turned, the value's channels
first: then what is new in a product, S, B or Y, is its left operand, which may stay in registers, and nothing of the chain
passes through shared memory. Products that the chain does not wait for, and what is written, go on beside it.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu import warpgroup as wg
from pallas_kernels.gpu.arrays import BETA, END, START, Prepared, Tokens, of_chunks, of_pieces, of_tokens
from pallas_kernels.gpu.plan import BLOCK, CHUNK, Plan
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
    """What is stored in every chunk has two places, that of the chunk before may be under way."""

    ring: Ring
    old: Ref  # the state that is stored, two of bfloat16 [key, 64]; or its parts, where it is an operand
    out: Ref  # O, or twice the parts of Y: [64, 64] each


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

        def leave(step: Array, o: Array, *, if_any: bool = False) -> None:
            """Writes the outputs of the chunk before a step; with `if_any` there may be none."""
            wg.stored()
            wg.put(wg.turned(scratch.out.at[0]), o)
            source, target = scratch.out.at[0], results.o.at[at.tokens(first_chunk + step - 1)]
            wg.store((source, target), when=step > 0 if if_any else None)

        def chunk(step: Array, now: tuple[Array, Array | None]) -> tuple[Array, Array | None]:
            slot, index = lax.rem(step, ring.slots), first_chunk + step
            return _chunk(plan, want, results, scratch, at, slot, index, *now, lambda o: leave(step, o, if_any=True))

        @pl.when(at.warpgroup == 0)
        def _() -> None:
            first = wg.zeros(BLOCK, plan.key)
            if inputs.state is not None:
                first = wg.read(inputs.state.at[at.edge])
            nothing = wg.zeros(BLOCK, CHUNK).astype(jnp.bfloat16) if outputs else None
            last, o = lax.fori_loop(0, plan.piece, chunk, (first, nothing))
            if o is not None:
                leave(jnp.int32(plan.piece), o)
            if not states:
                wg.put(results.state.at[at.edge], last)
            wg.stored(and_written=True)

    results = ScanResults(
        o=of_tokens(plan, plan.value) if outputs else None,
        state=of_pieces(plan) if not states else None,
        states=of_chunks(plan, plan.key, plan.value) if states else None,
        y=(of_tokens(plan, plan.value),) * plan.parts if states else None,
    )
    found: ScanResults = wg.kernel(
        body,
        PassInputs(tokens, done, None if state is None else state.mT),
        results,
        _scratch_shapes(plan, tokens, want),
        grid_of(plan),
        {"outputs": "delta_rule_forward", "states": "delta_rule_states", "ends": "delta_rule_ends"}[want],
        warpgroups=2,
    )
    return found if states else found._replace(state=found.state.mT)


def _scratch_shapes(plan: Plan, tokens: Tokens, want: Want) -> ScanScratch:
    ends, states, block = want == "ends", want == "states", BLOCK
    others: dict[str, Any] = {
        "old": wg.shared(1 + (ends or states), plan.key, block) if states or not in_registers(plan) else None,
        "out": None if ends else wg.shared(2 * plan.parts if states else 1, CHUNK, block),
    }
    ring = ring_shapes(plan, tokens, others, scores=want == "outputs")
    return ScanScratch(ring=ring, **others)


def _chunk(
    plan: Plan,
    want: Want,
    results: ScanResults,
    scratch: ScanScratch,
    at: PassProgram,
    slot: Array,
    index: Array,
    state: Array,
    o: Array | None,
    leave: Callable[[Array], None],
) -> tuple[Array, Array | None]:
    """Carries the state, float32 `[64, key]`, through the chunk `index`, which arrives in a slot of the ring.

    The outputs of a chunk, bfloat16 `[64, 64]`, are written while the first products of the next are under way.
    """
    outputs, states, ends = (want == name for name in ("outputs", "states", "ends"))
    here = jax.tree.map(lambda ref: ref.at[slot], scratch.ring.chunks)
    now, block, turn = at.tokens(index), BLOCK, lax.rem(index, 2)
    places: list[Any] = []
    if scratch.old is not None:
        places = [scratch.old.at[turn]] if states else list(wg.parts(scratch.old))

    def scalar(kind: int) -> Array:
        return wg.each_column(wg.along_columns(here.scalars.at[kind]), block)

    def run(known: wg.Sum, read: wg.Sum, y: wg.Sum, update: wg.Sum, among: wg.Sum) -> tuple[Array, Array | None]:
        old: list[Any] = wg.split_of(state, 1 + ends)

        def leave_state() -> None:
            if states:
                wg.stored(under_way=1 + plan.parts)
            for ref, part in zip(places, old, strict=True):
                ref = wg.turned(ref)
                ref[...] = part
            if states:
                wg.store((places[0], results.states.at[at.batch, at.head, index, :, at.channels]))

        if not in_registers(plan):
            leave_state()
            plgpu.commit_smem()
            old = [wg.turned(x) for x in places]
        wg.loaded(scratch.ring.full.at[slot])
        if plan.erases:
            known.add(*((part, wg.turned(here.erase_key)) for part in old))
        if outputs:
            read.add((old[0], wg.turned(here.q)))
        unknown = wg.read(wg.turned(here.v))
        if plan.erases:
            erased = known.value(under_way=outputs)
            erased = erased * (0.0 - scalar(START)) if plan.gate == "head" else 0.0 - erased
            high, low = wg.split_of(unknown + erased, 2)
            x_high, x_low = (wg.turned(part) for part in wg.parts(here.x))
            y.start(wg.zeros(*tokens))
            y.add((high, x_high), (low, x_high), (high, x_low))
        if states and in_registers(plan):
            leave_state()  # while products are under way
        if o is not None:
            leave(o)
            reads = read.value(under_way=3 if plan.erases else 0)
            if plan.gate != "channel":
                reads = reads * (scalar(START) * plan.scale if plan.gate == "head" else plan.scale)
        update.start(decayed_state(plan, here, state))
        left = y.value() if plan.erases else unknown
        new = left * scalar(BETA)
        for part in wg.split_of(new * scalar(END) if plan.gate == "head" else new, 1 + ends):
            update.add((part, here.k))
        if outputs:
            among.start(reads)
            among.add((new.astype(jnp.bfloat16), wg.turned(here.p)))
        if states:
            parts = tuple(scratch.out.at[turn * plan.parts + n] for n in range(plan.parts))
            wg.put_split(tuple(map(wg.turned, parts)), left)
            wg.store(*((part, y.at[now]) for part, y in zip(parts, results.y, strict=True)))
        after = update.value(under_way=outputs)
        new_o = among.value().astype(jnp.bfloat16) if outputs else None
        plgpu.barrier_arrive(scratch.ring.empty.at[slot])
        return after, new_o

    tokens, keys = (block, CHUNK), (block, plan.key)
    return wg.with_sums(run, tokens, tokens, tokens, keys, tokens)


def in_registers(plan: Plan) -> bool:
    """Whether there is room in registers for a state in bfloat16 beside that in float32."""
    return plan.key <= 128


def decayed_state(plan: Plan, here: Chunk, state: Array) -> Array:
    """exp(G_64) S, from the state with the value's channels first."""
    if plan.gate == "head":
        return state * here.scalars[START, CHUNK - 1]
    if plan.gate == "channel":
        return state * wg.each_column(wg.along_columns(here.whole), BLOCK)
    return state
