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

from pallas_kernels.gpu.arrays import BETA, END, START, Prepared, Tokens, of_chunks, of_pieces, of_tokens
from pallas_kernels.gpu.plan import CHUNK, Plan
from pallas_kernels.gpu.scan import (
    Inputs,
    arrivals,
    chunk_shapes,
    copies_of,
    decayed_state,
    fetch_all,
    stages_of,
)
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
)


class Results(NamedTuple):
    d_b: Any  # dB in the plan's `parts`, bfloat16 [batch, time, heads, value] each
    d_states: Ref  # the cotangent of the state after every chunk, bfloat16 [batch, heads, chunks, key, value]
    d_state: Ref  # that of the state before every piece, float32 [batch, heads, pieces, key, value]


class Scratch(NamedTuple):
    ring: Any  # a `Chunk`, of several chunks; dO is in the place of V
    full: Ref
    empty: Ref
    arrived: Ref
    edge: Ref  # the last and the first cotangent of the state, float32 [key, value_block]
    new: Ref  # dS', bfloat16 [key, value_block]
    d_y: Ref  # dY, split: [2, 64, value_block]
    d_reads: Ref  # what the state is read with: scale exp(G) dO and -exp(G) dB: [2, 64, value_block]
    out: Ref  # dB in its parts, [parts, 64, value_block]


def reverse(plan: Plan, tokens: Tokens, done: Prepared, d_o: Array, d_state: Array, *, ends: bool = False) -> Results:
    """From the cotangents of the outputs and of the state after every piece; with `ends` its last result alone."""
    block = plan.value_block

    def body(inputs: Inputs, results: Results, scratch: Scratch) -> None:
        which, head, piece, batch, warpgroup = place("block", "head", "piece", "batch", "warpgroup")
        channels, last_chunk = pl.ds(which * block, block), (piece + 1) * plan.piece - 1

        @pl.when(warpgroup == 1)
        def _() -> None:
            def copies(step: Array, slot: Array) -> list[tuple[Ref, Ref]]:
                return copies_of(plan, inputs, batch, head, which, last_chunk - step, scratch.ring, slot)

            fetch_all(plan, copies, scratch.full, scratch.empty, stages)

        def chunk(step: Array, d_state: Array) -> Array:
            slot, index = lax.rem(step, stages), last_chunk - step
            here = jax.tree.map(lambda ref: ref.at[slot], scratch.ring)
            erase = here.k if here.erase is None else here.erase

            def scalar(kind: int) -> Array:
                return each_row(along_rows(here.scalars.at[kind]), block)

            stored()
            put(scratch.new, d_state)
            if ends:
                plgpu.commit_smem()
            else:
                store((scratch.new, results.d_states.at[batch, head, index, :, channels]))
            loaded(scratch.full.at[slot])
            d_written, d_read = products([(here.k, scratch.new)], [(turned(here.p), here.v)])
            d_written = d_written * scalar(END) if plan.gate == "head" else d_written
            d_b = scalar(BETA) * (d_written + d_read)
            if plan.erases:
                put_split(scratch.d_y, d_b)
                plgpu.commit_smem()
                d_b = product(*split_pairs(here.x, scratch.d_y, turn_a=True))
            if not ends:
                put_split(scratch.out, d_b)
            d_reads = []
            if plan.gate == "channel":
                d_reads.append((turned(here.q), here.v))
            else:
                start = plan.scale * scalar(START) if plan.gate == "head" else plan.scale
                put(scratch.d_reads.at[0], read(here.v) * start)
                d_reads.append((turned(here.q), scratch.d_reads.at[0]))
            if plan.erases:
                put(scratch.d_reads.at[1], -d_b * scalar(START) if plan.gate == "head" else -d_b)
                d_reads.append((turned(erase), scratch.d_reads.at[1]))
            now = (batch, pl.ds(index * CHUNK, CHUNK), head, channels)
            if ends:
                plgpu.commit_smem()
            else:
                store(*((part, d_b.at[now]) for part, d_b in zip(parts(scratch.out), results.d_b, strict=True)))
            d_state = decayed_state(plan, here, d_state) + product(*d_reads)
            plgpu.barrier_arrive(scratch.empty.at[slot])
            return d_state

        @pl.when(warpgroup == 0)
        def _() -> None:
            load(scratch.arrived, (inputs.state.at[batch, head, piece, :, channels], scratch.edge))
            loaded(scratch.arrived)
            put(scratch.edge, lax.fori_loop(0, plan.piece, chunk, read(scratch.edge)))
            store((scratch.edge, results.d_state.at[batch, head, piece, :, channels]))
            stored(and_written=True)

    one = chunk_shapes(plan, tokens, 1, scores=True)
    swizzle = 2 * block
    others = Scratch(
        ring=None,
        full=None,
        empty=None,
        arrived=None,
        edge=shared(plan.key, block, dtype=jnp.float32),
        new=shared(plan.key, block, swizzle=swizzle),
        d_y=shared(2, CHUNK, block, swizzle=swizzle) if plan.erases else None,
        d_reads=shared(2, CHUNK, block, swizzle=swizzle),
        out=None if ends else shared(plan.parts, CHUNK, block, swizzle=swizzle),
    )
    stages = stages_of(plan, one, others)
    scratch = others._replace(
        ring=chunk_shapes(plan, tokens, stages, scores=True),
        full=plgpu.Barrier(num_arrivals=arrivals(one), num_barriers=stages),
        empty=plgpu.Barrier(num_barriers=stages),
        arrived=plgpu.Barrier(),
    )
    return kernel(
        body,
        Inputs(tokens._replace(v=d_o), done, d_state),
        Results(
            d_b=None if ends else (of_tokens(plan, plan.value),) * plan.parts,
            d_states=None if ends else of_chunks(plan, plan.key, plan.value),
            d_state=of_pieces(plan),
        ),
        scratch,
        {"block": plan.value // block, "head": plan.heads, "piece": plan.pieces, "batch": plan.batch},
        "delta_rule_reverse_ends" if ends else "delta_rule_reverse",
        warpgroups=2,
    )
