"""The sequential pass of the backward, from the last chunk to the first: the cotangent of the state stays in registers.

With the symbols of `pallas_kernels.gpu.scan`:

    dY = diag(b) (P^T dO + (exp(Z) K) dS')               dB = X^T dY, the cotangent of V
    dS = exp(G_64) dS' + scale (exp(G) Q)^T dO - (exp(G) E)^T dB

Programs and warpgroups share the work as in the forward pass, and here too all that follows from the state is turned.
"""

from typing import Any, NamedTuple

from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels.gpu import products as mm
from pallas_kernels.gpu import warpgroup as wg
from pallas_kernels.gpu.arrays import BETA, END, START, Prepared, Tokens, of_chunks, of_pieces, of_tokens, places_of
from pallas_kernels.gpu.plan import BLOCK, CHUNK, Plan
from pallas_kernels.gpu.ring import Chunks, PassInputs, Ring, grid_of, program, ring_shapes
from pallas_kernels.gpu.scan import decayed_state, in_registers
from pallas_kernels.gpu.warpgroup import Ref


class ReverseResults(NamedTuple):
    d_b: Any  # dB in the plan's `parts`, bfloat16 [batch, time, heads * value] each
    d_states: (
        Any  # that of the state after every chunk in its `split`, bfloat16 [batch, heads, chunks, key, value] each
    )
    d_state: Ref  # that of the state before every piece, float32 [batch, heads, pieces, key, value]


class ReverseScratch(NamedTuple):
    ring: Ring  # dO is in the place of V
    # The parts of rows of dS', bfloat16 [..., 64] each; in their place those of dB, [64, 64] each; None without results.
    out: Any


def reverse(
    plan: Plan, tokens: Tokens, done: Prepared, d_o: tuple[Array, ...], d_state: Array, *, ends: bool = False
) -> ReverseResults:
    """From the cotangents of the outputs and of the state after every piece; with `ends` its last result alone.

    `d_o` is bfloat16 `[batch, time, heads * value]` in the plan's `split`, `d_state` float32 `[batch, heads, pieces, key,
    value]`.
    """

    def body(inputs: PassInputs, results: ReverseResults, scratch: ReverseScratch) -> None:
        at = program(plan)
        last_chunk = (at.piece + 1) * plan.piece - 1
        chunks = Chunks(plan, inputs, at, scratch.ring, lambda step: last_chunk - step)

        def chunk(step: Array, d_state: Array) -> Array:
            return _chunk(chunks, results, scratch, step, d_state, ends=ends)

        def compute() -> None:
            last = lax.fori_loop(0, plan.piece, chunk, wg.read(inputs.state.at[at.edge]))
            wg.put(results.d_state.at[at.edge], last)
            wg.stored(and_written=True)

        chunks.go_over(compute)

    found: ReverseResults = wg.kernel(
        plan.machine,
        body,
        PassInputs(tokens._replace(v=d_o), done, d_state.mT),
        ReverseResults(
            d_b=None if ends else (of_tokens(plan, plan.value),) * plan.parts,
            d_states=None if ends else (of_chunks(plan, plan.key, plan.value),) * plan.split,
            d_state=of_pieces(plan),
        ),
        _scratch_shapes(plan, ends=ends),
        grid_of(plan),
        "delta_rule_reverse_ends" if ends else "delta_rule_reverse",
        warpgroups=1 + plan.machine.fetching,
    )
    return found._replace(d_state=found.d_state.mT)


def _scratch_shapes(plan: Plan, *, ends: bool) -> ReverseScratch:
    rows = plan.key if plan.machine.places > 1 or not in_registers(plan) else BLOCK
    rows = max(rows, plan.parts * CHUNK // plan.split)
    others = {"out": None if ends and in_registers(plan) else (wg.shared(rows, BLOCK),) * plan.split}
    return ReverseScratch(ring=ring_shapes(plan, others, scores=True), **others)


def _chunk(
    chunks: Chunks,
    results: ReverseResults,
    scratch: ReverseScratch,
    step: Array,
    d_state: Array,
    *,
    ends: bool,
) -> Array:
    """Carries the cotangent of the state, float32 `[64, key]`, back through the chunk of a step."""
    plan, at, here, index = chunks.plan, chunks.at, chunks.slot(step), chunks.chunk_of(step)
    rows = plan.key if scratch.out is None else min(plan.key, scratch.out[0].shape[0])
    held = places_of(scratch.out, pl.ds(0, rows))

    def scalar(kind: int) -> Array:
        return wg.each_column(wg.along_columns(here.scalars.at[kind]), BLOCK)

    def run(written: mm.Sum, read: mm.Sum, y: mm.Sum, update: mm.Sum) -> Array:
        new: Any = wg.split_of(d_state, plan.split)

        def leave() -> None:
            for start in range(0, plan.key, rows):
                wg.stored()
                for ref, part in zip(held, new, strict=True):
                    wg.put_turned(ref, part if rows == plan.key else lax.slice(part, (0, start), (BLOCK, start + rows)))
                if not ends:
                    now = (at.batch, at.head, index, pl.ds(start, rows), at.channels)
                    wg.store((held, places_of(results.d_states, now)))

        if not in_registers(plan):
            leave()
            mm.commit()
            new = wg.turned(held)
        chunks.arrived(step)
        written.add((new, wg.turned(here.k)))
        read.add((wg.turned(here.v), here.p))
        d_o = wg.read(wg.turned(here.v))
        if plan.gate != "channel":
            d_o = d_o * (scalar(START) * plan.scale if plan.gate == "head" else plan.scale)
        d_written = written.value(under_way=1)
        d_written = d_written * scalar(END) if plan.gate == "head" else d_written
        d_b = (d_written + read.value()) * scalar(BETA)
        update.start(decayed_state(plan, here, d_state))
        update.add((wg.split_of(d_o, plan.split), here.q))
        if plan.erases:
            y.start(wg.zeros(BLOCK, CHUNK))
            y.add((wg.split_of(d_b, 2), wg.along_first(here.x)))
        if in_registers(plan) and not ends:
            leave()  # while products are under way
        if plan.erases:
            d_b = y.value()
            # Not `-d_b`: the compiler would carry out the negation before the product is there, and wait for each alone.
            back = d_b * (0.0 - scalar(START)) if plan.gate == "head" else 0.0 - d_b
            update.add((wg.split_of(back, plan.split), here.erase_key))
        if not ends:
            wg.stored()
            several = plan.parts // plan.split
            parts = tuple(x.at[pl.ds(CHUNK * n, CHUNK)] for x in scratch.out for n in range(several))
            wg.put_turned(parts, d_b)
            wg.store((parts, places_of(results.d_b, at.tokens(index))))
        after = update.value()
        chunks.done(step)
        return after

    tokens = (BLOCK, CHUNK)
    return mm.with_sums(run, tokens, tokens, tokens, (BLOCK, plan.key))
