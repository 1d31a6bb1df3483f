"""The sequential pass of the backward, from the last chunk to the first: the cotangent of the state stays in registers.

With the symbols of `pallas_kernels.gpu.scan`:

    dY = diag(b) (P^T dO + (exp(Z) K) dS')               dB = X^T dY, the cotangent of V
    dS = exp(G_64) dS' + scale (exp(G) Q)^T dO - (exp(G) E)^T dB

Programs and warpgroups share the work as in the forward pass.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu import warpgroup as wg
from pallas_kernels.gpu.arrays import BETA, END, START, Prepared, Tokens, of_chunks, of_pieces, of_tokens
from pallas_kernels.gpu.plan import CHUNK, Plan
from pallas_kernels.gpu.ring import PassInputs, PassProgram, Ring, fetch, grid_of, program, ring_shapes
from pallas_kernels.gpu.scan import decayed_state
from pallas_kernels.gpu.warpgroup import Ref


class ReverseResults(NamedTuple):
    d_b: Any  # dB in the plan's `parts`, bfloat16 [batch, time, heads, value] each
    d_states: Ref  # the cotangent of the state after every chunk, bfloat16 [batch, heads, chunks, key, value]
    d_state: Ref  # that of the state before every piece, float32 [batch, heads, pieces, key, value]


class ReverseScratch(NamedTuple):
    ring: Ring  # dO is in the place of V
    arrived: Ref  # the barrier of the last cotangent of the state
    edge: Ref  # the last and the first cotangent of the state, float32 [key, value_block]
    new: Ref  # dS', bfloat16 [key, value_block]
    d_y: Ref  # dY, split: [2, 64, value_block]
    d_reads: Ref  # what the state is read with: scale exp(G) dO and -exp(G) dB, [2, 64, value_block]
    out: Ref  # dB in its parts, [parts, 64, value_block]


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
            wg.load(scratch.arrived, (inputs.state.at[at.edge], scratch.edge))
            wg.loaded(scratch.arrived)
            wg.put(scratch.edge, lax.fori_loop(0, plan.piece, chunk, wg.read(scratch.edge)))
            wg.store((scratch.edge, results.d_state.at[at.edge]))
            wg.stored(and_written=True)

    return wg.kernel(
        body,
        PassInputs(tokens._replace(v=d_o), done, d_state),
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


def _scratch_shapes(plan: Plan, tokens: Tokens, *, ends: bool) -> ReverseScratch:
    block = plan.value_block
    swizzle = 2 * block
    others: dict[str, Any] = {
        "edge": wg.shared(plan.key, block, dtype=jnp.float32),
        "new": wg.shared(plan.key, block, swizzle=swizzle),
        "d_y": wg.shared(2, CHUNK, block, swizzle=swizzle) if plan.erases else None,
        "d_reads": wg.shared(2, CHUNK, block, swizzle=swizzle),
        "out": None if ends else wg.shared(plan.parts, CHUNK, block, swizzle=swizzle),
    }
    ring = ring_shapes(plan, tokens, others, scores=True)
    return ReverseScratch(ring=ring, arrived=plgpu.Barrier(), **others)


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
    """Carries the cotangent of the state, float32 `[key, value_block]`, back through the chunk `index` of a ring's slot."""
    block = plan.value_block
    here = jax.tree.map(lambda ref: ref.at[slot], scratch.ring.chunks)

    def scalar(kind: int) -> Array:
        return wg.each_row(wg.along_rows(here.scalars.at[kind]), block)

    wg.stored()
    wg.put(scratch.new, d_state)
    if ends:
        plgpu.commit_smem()
    else:
        wg.store((scratch.new, results.d_states.at[at.batch, at.head, index, :, at.channels]))
    wg.loaded(scratch.ring.full.at[slot])
    d_written, d_read = wg.products([(here.k, scratch.new)], [(wg.turned(here.p), here.v)])
    d_written = d_written * scalar(END) if plan.gate == "head" else d_written
    d_b = scalar(BETA) * (d_written + d_read)
    if plan.erases:
        wg.put_split(scratch.d_y, d_b)
        plgpu.commit_smem()
        d_b = wg.product(*wg.split_pairs(here.x, scratch.d_y, turn_a=True))
    if not ends:
        wg.put_split(scratch.out, d_b)
    d_reads = []
    if plan.gate == "channel":
        d_reads.append((wg.turned(here.q), here.v))
    else:
        start = plan.scale * scalar(START) if plan.gate == "head" else plan.scale
        wg.put(scratch.d_reads.at[0], wg.read(here.v) * start)
        d_reads.append((wg.turned(here.q), scratch.d_reads.at[0]))
    if plan.erases:
        # Not `-d_b`: the compiler would carry out the negation before the product is there, and wait for each alone.
        wg.put(scratch.d_reads.at[1], d_b * (0.0 - scalar(START)) if plan.gate == "head" else 0.0 - d_b)
        d_reads.append((wg.turned(here.erase_key), scratch.d_reads.at[1]))
    now = at.tokens(index)
    if ends:
        plgpu.commit_smem()
    else:
        wg.store(*((part, d_b.at[now]) for part, d_b in zip(wg.parts(scratch.out), results.d_b, strict=True)))
    d_state = decayed_state(plan, here, d_state) + wg.product(*d_reads)
    plgpu.barrier_arrive(scratch.ring.empty.at[slot])
    return d_state
