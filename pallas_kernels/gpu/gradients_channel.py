"""Cotangents of queries, keys, scores and gates, for all chunks at once; a gate per channel.

As `pallas_kernels.gpu.gradients`, level by level (`pallas_kernels.gpu.levels`): with f the factors of a level and dP, dA
what it has of the cotangents of the scores,

    dQ += f (dP (f K))        dE += f (dA (f K))        dK += f (dP^T (f Q) + dA^T (f E))

The cotangent of a gate is gathered from every factor that holds it, `factor * d_factor`: the matrix that summed the gates of
a level, transposed, times what the level gives to the keys, times the keys. What reads the state at the start of the chunk
and what writes to the one at its end are two levels more.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu import warpgroup as wg
from pallas_kernels.gpu.arrays import BETA
from pallas_kernels.gpu.cotangents import COLUMNS, WRITES, Cotangents, Gradients, Inputs, Products, Program, launch
from pallas_kernels.gpu.levels import factors, meets, over_levels
from pallas_kernels.gpu.plan import BLOCK, CHUNK, Plan
from pallas_kernels.gpu.warpgroup import Ref


class GradientsChannelScratch(NamedTuple):
    """Matrices `[64, 64]`."""

    scores: Ref  # dP and dA, [2, 64, 64]
    part: Ref  # those of a level, [2, 64, 64]
    q: Ref  # decayed keys
    k: Ref
    erase: Ref
    takes: Ref  # which gates a factor takes
    terms: Ref  # what the factors of a level have to give to the gates, split: [2, 64, 64]
    gates: Ref  # float32


def gradients_channel(plan: Plan, inputs: Inputs) -> Gradients:
    def scores(here: Program, known: Products, scratch: GradientsChannelScratch) -> Cotangents:
        row, column = wg.indices(CHUNK, CHUNK)
        beta = wg.each_column(wg.along_columns(here.scalars.at[BETA]), CHUNK)
        terms = known.d_p * wg.read_split(here.p)
        wg.put(scratch.scores.at[0], known.d_p * beta * plan.scale)
        if plan.erases:
            terms = terms - known.d_a * wg.read_split(here.a)
            wg.put(scratch.scores.at[1], -known.d_a * beta)
        here.sums[COLUMNS] = jnp.sum(terms, axis=0)

        def gives(terms: Array) -> Array:
            """What the gates get from the factors whose gates are in `scratch.takes`."""
            wg.put_split(scratch.terms, terms)
            plgpu.commit_smem()
            held = wg.turned(scratch.takes)
            return wg.product((held, scratch.terms.at[0]), (held, scratch.terms.at[1]))

        q, k, erase = here.q, here.k, here.erase_key
        factor = factors("start", here.gates, scratch.takes)
        d_q = known.d_q * factor * plan.scale
        terms, d_erase = wg.read(q) * d_q, None
        if plan.erases:
            d_erase = -known.d_erase * factor
            terms = terms + wg.read(erase) * d_erase
        d_gates = gives(terms)
        d_k = known.d_k * factors("end", here.gates, scratch.takes)
        here.sums[WRITES] = jnp.sum(wg.read(k) * d_k, axis=1)
        d_k = d_k * wg.each_row(wg.along_rows(here.scalars.at[BETA]), BLOCK)
        d_gates = d_gates + gives(wg.read(k) * d_k)

        wg.put(scratch.part.at[0], jnp.where(row == column, wg.read(scratch.scores.at[0]), 0.0))
        plgpu.commit_smem()
        d_q = d_q + wg.product((scratch.part.at[0], k))
        d_k = d_k + wg.product((scratch.part.at[0], q))

        def level(size: Array, now: Any) -> Any:
            d_q, d_k, d_gates, d_erase = now
            factor = factors(size, here.gates, scratch.takes)
            wg.put(scratch.q, wg.read(q) * factor)
            wg.put(scratch.k, wg.read(k) * factor)
            wg.put(scratch.part.at[0], jnp.where(meets(size), wg.read(scratch.scores.at[0]), 0.0))
            pairs = [(wg.turned(scratch.part.at[0]), scratch.q)]
            if plan.erases:
                decayed = scratch.k
                if plan.erase_heads:
                    decayed = scratch.erase
                    wg.put(decayed, wg.read(erase) * factor)
                wg.put(scratch.part.at[1], jnp.where(meets(size), wg.read(scratch.scores.at[1]), 0.0))
                pairs.append((wg.turned(scratch.part.at[1]), decayed))
            plgpu.commit_smem()
            d_read = wg.product((scratch.part.at[0], scratch.k)) * factor
            d_q, terms = d_q + d_read, wg.read(q) * d_read
            if plan.erases:
                d_read = wg.product((scratch.part.at[1], scratch.k)) * factor
                d_erase, terms = d_erase + d_read, terms + wg.read(erase) * d_read
            d_write = wg.product(*pairs) * factor
            d_k, terms = d_k + d_write, terms + wg.read(k) * d_write
            return d_q, d_k, d_gates + gives(terms), d_erase

        d_q, d_k, d_gates, d_erase = over_levels(level, (d_q, d_k, d_gates, d_erase))
        wg.put(scratch.gates, d_gates)
        return Cotangents(d_q, d_k, d_erase, scratch.gates)

    matrix, two = wg.shared(CHUNK, CHUNK), wg.shared(2, CHUNK, CHUNK)
    scratch = GradientsChannelScratch(
        scores=two,
        part=two,
        q=matrix,
        k=matrix,
        erase=matrix if plan.erase_heads else None,
        takes=matrix,
        terms=two,
        gates=wg.shared(CHUNK, BLOCK, dtype=jnp.float32),
    )
    return launch(plan, inputs, scores, scratch)
