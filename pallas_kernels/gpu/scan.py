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

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels.gpu import products as mm
from pallas_kernels.gpu import warpgroup as wg
from pallas_kernels.gpu.arrays import BETA, END, START, Prepared, Tokens, of_chunks, of_pieces, of_tokens, places_of
from pallas_kernels.gpu.plan import BLOCK, CHUNK, Plan
from pallas_kernels.gpu.ring import Chunk, Chunks, PassInputs, Ring, grid_of, program, ring_shapes
from pallas_kernels.gpu.warpgroup import Ref

Want = Literal["outputs", "kept", "ends"]


class ScanResults(NamedTuple):
    """What the forward gives, the first two; and what is kept for the backward, the last two."""

    o: Any  # in the plan's `split`, bfloat16 [batch, time, heads * value] each
    state: Ref  # after every piece, float32 [batch, heads, pieces, key, value]
    states: Any  # the state before every chunk in the plan's `split`, bfloat16 [batch, heads, chunks, key, value] each
    y: Any  # Y in its `parts`, bfloat16 [batch, time, heads * value] each


class ScanScratch(NamedTuple):
    """What is stored in every chunk has the plan's `places`; with one, all that is stored has the same place in turn."""

    ring: Ring
    old: Ref  # the parts of the state in every place where it is stored, else where it is an operand: [key, 64] each
    out: Ref  # those of O, and of Y in every place: [64, 64] each


def scan(plan: Plan, tokens: Tokens, done: Prepared, state: Array | None, *, want: Want) -> ScanResults:
    """Outputs and final states, also with the states before every chunk and Y; or the states after every piece alone.

    `state` is that before every piece, float32 `[batch, heads, pieces, key, value]`, None for zero. The ends of pieces are
    joined to others: there the state is read, and written to, with operands of two parts.
    """
    outputs, kept = want != "ends", want == "kept"

    def body(inputs: PassInputs, results: ScanResults, scratch: ScanScratch) -> None:
        at = program(plan)
        first_chunk = at.piece * plan.piece
        chunks = Chunks(plan, inputs, at, scratch.ring, lambda step: first_chunk + step)

        def leave(step: Array, o: list[Array], *, if_any: bool = False) -> None:
            """Writes the outputs of the chunk before a step; with `if_any` there may be none."""
            # In a chunk Y of the one before and its own state may be under way, and what is older may not; after the last
            # there is no state, so that as many would let the outputs before be written over.
            wg.stored(under_way=plan.parts + plan.split if kept and if_any and plan.places > 1 else 0)
            tiles = wg.along_first(scratch.out)[: plan.split]
            for tile, part in zip(tiles, o, strict=True):
                wg.put_turned(tile, part)
            target = places_of(results.o, at.tokens(first_chunk + step - 1))
            wg.store((tiles, target), when=step > 0 if if_any else None)

        def chunk(step: Array, now: tuple[Array, Any]) -> tuple[Array, Any]:
            return _chunk(chunks, want, results, scratch, step, *now, lambda o: leave(step, o, if_any=True))

        def compute() -> None:
            first = wg.zeros(BLOCK, plan.key)
            if inputs.state is not None:
                first = wg.read(inputs.state.at[at.edge])
            nothing = wg.split_of(wg.zeros(BLOCK, CHUNK), plan.split) if outputs else None
            last, o = lax.fori_loop(0, plan.piece, chunk, (first, nothing))
            if o is not None:
                leave(jnp.int32(plan.piece), o)
            wg.put(results.state.at[at.edge], last)
            wg.stored(and_written=True)

        chunks.go_over(compute)

    results = ScanResults(
        o=(of_tokens(plan, plan.value),) * plan.split if outputs else None,
        state=of_pieces(plan),
        states=(of_chunks(plan, plan.key, plan.value),) * plan.split if kept else None,
        y=(of_tokens(plan, plan.value),) * plan.parts if kept else None,
    )
    found: ScanResults = wg.kernel(
        plan.machine,
        body,
        PassInputs(tokens, done, None if state is None else state.mT),
        results,
        _scratch_shapes(plan, want),
        grid_of(plan),
        "delta_rule_forward" if outputs else "delta_rule_ends",
        warpgroups=1 + plan.machine.fetching,
    )
    return found._replace(state=found.state.mT)


def _scratch_shapes(plan: Plan, want: Want) -> ScanScratch:
    kept, places = want == "kept", plan.places
    others: dict[str, Any] = {"old": None, "out": None}
    if want != "ends":
        count = plan.split + places * plan.parts if places > 1 else plan.parts
        others["out"] = wg.shared(count if kept else plan.split, CHUNK, BLOCK)
    if (kept and places > 1) or not in_registers(plan):
        count = places * plan.split if kept else _parts_of_state(plan, want)
        others["old"] = wg.shared(count, plan.key, BLOCK)
    ring = ring_shapes(plan, others, scores=want != "ends")
    return ScanScratch(ring=ring, **others)


def _chunk(
    chunks: Chunks,
    want: Want,
    results: ScanResults,
    scratch: ScanScratch,
    step: Array,
    state: Array,
    o: list[Array] | None,
    leave: Callable[[list[Array]], None],
) -> tuple[Array, Any]:
    """Carries the state, float32 `[64, key]`, through the chunk of a step.

    The outputs of a chunk, bfloat16 `[64, 64]`, are written while the first products of the next are under way.
    """
    outputs, kept = want != "ends", want == "kept"
    plan, at, here, index = chunks.plan, chunks.at, chunks.slot(step), chunks.chunk_of(step)
    now, block, turn = at.tokens(index), BLOCK, lax.rem(index, plan.places)
    places: tuple[Any, ...] = ()
    if scratch.old is not None:
        places = wg.along_first(scratch.old)
        if kept:
            places = tuple(scratch.old.at[turn * plan.split + n] for n in range(plan.split))
    elif kept:
        places = wg.along_first(scratch.out)[: plan.split]

    def scalar(kind: int) -> Array:
        return wg.each_column(wg.along_columns(here.scalars.at[kind]), block)

    def run(known: mm.Sum, read: mm.Sum, y: mm.Sum, update: mm.Sum, among: mm.Sum) -> tuple[Array, Any]:
        old: Any = wg.split_of(state, _parts_of_state(plan, want))

        def leave_state() -> None:
            rows = places[0].shape[0]
            for start in range(0, plan.key, rows):
                if kept and plan.places == 1:
                    wg.stored()
                for ref, part in zip(places, old, strict=True):
                    wg.put_turned(ref, part if rows == plan.key else lax.slice(part, (0, start), (block, start + rows)))
                if kept:
                    where = (at.batch, at.head, index, pl.ds(start, rows), at.channels)
                    wg.store((places, places_of(results.states, where)))

        if not in_registers(plan):
            leave_state()
            mm.commit()
            old = wg.turned(places)
        chunks.arrived(step)
        if plan.erases:
            known.add((old, wg.turned(here.erase_key)))
        if outputs:
            read.add((old, wg.turned(here.q)))
        unknown = wg.read(wg.turned(here.v))
        if plan.erases:
            erased = known.value(under_way=outputs)
            erased = erased * (0.0 - scalar(START)) if plan.gate == "head" else 0.0 - erased
            y.start(wg.zeros(*tokens))
            y.add((wg.split_of(unknown + erased, 2), wg.turned(wg.along_first(here.x))))
        if kept and in_registers(plan):
            leave_state()  # while products are under way
        if o is not None:
            leave(o)
            reads = read.value(under_way=3 if plan.erases else 0)
            if plan.gate != "channel":
                reads = reads * (scalar(START) * plan.scale if plan.gate == "head" else plan.scale)
        update.start(decayed_state(plan, here, state))
        left = y.value() if plan.erases else unknown
        new = left * scalar(BETA)
        written = new * scalar(END) if plan.gate == "head" else new
        update.add((wg.split_of(written, _parts_of_state(plan, want)), here.k))
        if outputs:
            among.start(reads)
            among.add((wg.split_of(new, plan.split), wg.turned(here.p)))
        if kept:
            parts = wg.along_first(scratch.out)
            if plan.places > 1:
                parts = tuple(scratch.out.at[plan.split + turn * plan.parts + n] for n in range(plan.parts))
            else:
                wg.stored()
            wg.put_turned(parts, left)
            wg.store((parts, places_of(results.y, now)))
        after = update.value(under_way=outputs)
        new_o = wg.split_of(among.value(), plan.split) if outputs else None
        chunks.done(step)
        return after, new_o

    tokens, keys = (block, CHUNK), (block, plan.key)
    return mm.with_sums(run, tokens, tokens, tokens, keys, tokens)


def _parts_of_state(plan: Plan, want: Want) -> int:
    """In how many parts the state is an operand, and what is written to it."""
    return max(plan.split, 2 if want == "ends" else 1)


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
