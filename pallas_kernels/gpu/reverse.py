"""The sequential pass of the backward, from the last chunk to the first: the cotangent of the state stays in registers.

With the symbols of `pallas_kernels.gpu.scan`:

    dY = diag(b) (P^T dO + (exp(Z) K) dS')               dB = X^T dY, the cotangent of V
    dS = exp(G_64) dS' + scale (exp(G) Q)^T dO - (exp(G) E)^T dB

Programs and warpgroups share the work as in the forward pass, and here too all that follows from the state is turned.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu import warpgroup as wg
from pallas_kernels.gpu.arrays import BETA, END, START, Prepared, Tokens, of_chunks, of_pieces, of_tokens
from pallas_kernels.gpu.plan import BLOCK, CHUNK, Plan
from pallas_kernels.gpu.ring import PassInputs, PassProgram, Ring, fetch, grid_of, program, ring_shapes
from pallas_kernels.gpu.scan import decayed_state, in_registers
from pallas_kernels.gpu.warpgroup import Ref


class ReverseResults(NamedTuple):
    d_b: Any  # dB in the plan's `parts`, bfloat16 [batch, time, heads, value] each
    d_states: Ref  # the cotangent of the state after every chunk, bfloat16 [batch, heads, chunks, key, value]
    d_state: Ref  # that of the state before every piece, float32 [batch, heads, pieces, key, value]


class ReverseScratch(NamedTuple):
    ring: Ring  # dO is in the place of V
    # dS', bfloat16 [key, 64], then in its place the parts of dB, [64, 64] each; None where both stay in registers
    out: Ref


def reverse(
    plan: Plan, tokens: Tokens, done: Prepared, d_o: Array, d_state: Array, *, ends: bool = False
) -> ReverseResults:
    """From the cotangents of the outputs and of the state after every piece; with `ends` its last result alone.

    `d_o` is bfloat16 `[batch, time, heads, value]`, `d_state` float32 `[batch, heads, pieces, key, value]`.
    """

    def body(inputs: PassInputs, results: ReverseResults, scratch: ReverseScratch) -> None:
        at = program(plan)
        last_chunk, ring = (at.piece + 1) * plan.piece - 1, scratch.ring

        @pl.when(at.warpgroup == 1)
        def _() -> None:
            fetch(plan, inputs, at, ring, lambda step: last_chunk - step)

        def chunk(step: Array, d_state: Array) -> Array:
            slot, index = lax.rem(step, ring.slots), last_chunk - step
            return _chunk(plan, results, scratch, at, slot, index, d_state, ends=ends)

        @pl.when(at.warpgroup == 0)
        def _() -> None:
            last = lax.fori_loop(0, plan.piece, chunk, wg.read(inputs.state.at[at.edge]))
            wg.put(results.d_state.at[at.edge], last)
            wg.stored(and_written=True)

    found: ReverseResults = wg.kernel(
        body,
        PassInputs(tokens._replace(v=d_o), done, d_state.mT),
        ReverseResults(
            d_b=None if ends else (of_tokens(plan, plan.value),) * plan.parts,
            d_states=None if ends else of_chunks(plan, plan.key, plan.value),
            d_state=of_pieces(plan),
        ),
        _scratch_shapes(plan, tokens, ends=ends),
        grid_of(plan),
        "delta_rule_reverse_ends" if ends else "delta_rule_reverse",
        warpgroups=2,
    )
    return found._replace(d_state=found.d_state.mT)


def _scratch_shapes(plan: Plan, tokens: Tokens, *, ends: bool) -> ReverseScratch:
    rows = max(plan.key, plan.parts * CHUNK)
    others = {"out": None if ends and in_registers(plan) else wg.shared(rows, BLOCK)}
    return ReverseScratch(ring=ring_shapes(plan, tokens, others, scores=True), **others)


def _chunk(
    plan: Plan,
    results: ReverseResults,
    scratch: ReverseScratch,
    at: PassProgram,
    slot: Array,
    index: Array,
    d_state: Array,
    *,
    ends: bool,
) -> Array:
    """Carries the cotangent of the state, float32 `[64, key]`, back through the chunk `index` of a ring's slot."""
    here = jax.tree.map(lambda ref: ref.at[slot], scratch.ring.chunks)
    held = None if scratch.out is None else scratch.out.at[pl.ds(0, plan.key)]

    def scalar(kind: int) -> Array:
        return wg.each_column(wg.along_columns(here.scalars.at[kind]), BLOCK)

    def run(written: wg.Sum, read: wg.Sum, y: wg.Sum, update: wg.Sum) -> Array:
        new: Any = d_state.astype(jnp.bfloat16)

        def leave() -> None:
            wg.stored()
            wg.put(wg.turned(held), new)
            if not ends:
                wg.store((held, results.d_states.at[at.batch, at.head, index, :, at.channels]))

        if not in_registers(plan):
            leave()
            plgpu.commit_smem()
            new = wg.turned(held)
        wg.loaded(scratch.ring.full.at[slot])
        written.add((new, wg.turned(here.k)))
        read.add((wg.turned(here.v), here.p))
        d_o = wg.read(wg.turned(here.v))
        if plan.gate != "channel":
            d_o = d_o * (scalar(START) * plan.scale if plan.gate == "head" else plan.scale)
        d_written = written.value(under_way=1)
        d_written = d_written * scalar(END) if plan.gate == "head" else d_written
        d_b = (d_written + read.value()) * scalar(BETA)
        update.start(decayed_state(plan, here, d_state))
        update.add((d_o.astype(jnp.bfloat16), here.q))
        if plan.erases:
            high, low = wg.split_of(d_b, 2)
            x_high, x_low = wg.parts(here.x)
            y.start(wg.zeros(BLOCK, CHUNK))
            y.add((high, x_high), (low, x_high), (high, x_low))
        if in_registers(plan) and not ends:
            leave()  # while products are under way
        if plan.erases:
            d_b = y.value()
            # Not `-d_b`: the compiler would carry out the negation before the product is there, and wait for each alone.
            back = d_b * (0.0 - scalar(START)) if plan.gate == "head" else 0.0 - d_b
            update.add((back.astype(jnp.bfloat16), here.erase_key))
        if not ends:
            wg.stored()
            parts = tuple(scratch.out.at[pl.ds(CHUNK * n, CHUNK)] for n in range(plan.parts))
            wg.put_split(tuple(map(wg.turned, parts)), d_b)
            now = at.tokens(index)
            wg.store(*((part, d_b.at[now]) for part, d_b in zip(parts, results.d_b, strict=True)))
        after = update.value()
        plgpu.barrier_arrive(scratch.ring.empty.at[slot])
        return after

    tokens = (BLOCK, CHUNK)
    return wg.with_sums(run, tokens, tokens, tokens, (BLOCK, plan.key))
