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

from pallas_kernels.gpu.arrays import BETA
from pallas_kernels.gpu.cotangents import COLUMNS, WRITES, Cotangents, Gradients, Inputs, Products, Program, launch
from pallas_kernels.gpu.levels import factors, meets, over_levels
from pallas_kernels.gpu.plan import BLOCK, CHUNK, Plan
from pallas_kernels.gpu.warpgroup import (
    Ref,
    along_columns,
    along_rows,
    each_column,
    each_row,
    indices,
    product,
    put,
    put_split,
    read,
    read_split,
    shared,
    turned,
)


class Scratch(NamedTuple):
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
    def scores(here: Program, known: Products, scratch: Scratch) -> Cotangents:
        row, column = indices(CHUNK, CHUNK)
        beta = each_column(along_columns(here.scalars.at[BETA]), CHUNK)
        terms = known.d_p * read_split(here.p)
        put(scratch.scores.at[0], known.d_p * beta * plan.scale)
        if plan.erases:
            terms = terms - known.d_a * read_split(here.a)
            put(scratch.scores.at[1], -known.d_a * beta)
        here.sums[COLUMNS] = jnp.sum(terms, axis=0)

        def gives(terms: Array) -> Array:
            """What the gates get from the factors whose gates are in `scratch.takes`."""
            put_split(scratch.terms, terms)
            plgpu.commit_smem()
            held = turned(scratch.takes)
            return product((held, scratch.terms.at[0]), (held, scratch.terms.at[1]))

        q, k, erase = here.q, here.k, here.erase_key
        factor = factors("start", here.gates, scratch.takes)
        d_q = known.d_q * factor * plan.scale
        terms, d_erase = read(q) * d_q, None
        if plan.erases:
            d_erase = -known.d_erase * factor
            terms = terms + read(erase) * d_erase
        d_gates = gives(terms)
        d_k = known.d_k * factors("end", here.gates, scratch.takes)
        here.sums[WRITES] = jnp.sum(read(k) * d_k, axis=1)
        d_k = d_k * each_row(along_rows(here.scalars.at[BETA]), BLOCK)
        d_gates = d_gates + gives(read(k) * d_k)

        put(scratch.part.at[0], jnp.where(row == column, read(scratch.scores.at[0]), 0.0))
        plgpu.commit_smem()
        d_q = d_q + product((scratch.part.at[0], k))
        d_k = d_k + product((scratch.part.at[0], q))

        def level(size: Array, now: Any) -> Any:
            d_q, d_k, d_gates, d_erase = now
            factor = factors(size, here.gates, scratch.takes)
            put(scratch.q, read(q) * factor)
            put(scratch.k, read(k) * factor)
            put(scratch.part.at[0], jnp.where(meets(size), read(scratch.scores.at[0]), 0.0))
            pairs = [(turned(scratch.part.at[0]), scratch.q)]
            if plan.erases:
                decayed = scratch.k
                if plan.erase_heads:
                    decayed = scratch.erase
                    put(decayed, read(erase) * factor)
                put(scratch.part.at[1], jnp.where(meets(size), read(scratch.scores.at[1]), 0.0))
                pairs.append((turned(scratch.part.at[1]), decayed))
            plgpu.commit_smem()
            d_read = product((scratch.part.at[0], scratch.k)) * factor
            d_q, terms = d_q + d_read, read(q) * d_read
            if plan.erases:
                d_read = product((scratch.part.at[1], scratch.k)) * factor
                d_erase, terms = d_erase + d_read, terms + read(erase) * d_read
            d_write = product(*pairs) * factor
            d_k, terms = d_k + d_write, terms + read(k) * d_write
            return d_q, d_k, d_gates + gives(terms), d_erase

        d_q, d_k, d_gates, d_erase = over_levels(level, (d_q, d_k, d_gates, d_erase))
        put(scratch.gates, d_gates)
        return Cotangents(d_q, d_k, d_erase, scratch.gates)

    matrix, two = shared(CHUNK, CHUNK), shared(2, CHUNK, CHUNK)
    scratch = Scratch(
        scores=two,
        part=two,
        q=matrix,
        k=matrix,
        erase=matrix if plan.erase_heads else None,
        takes=matrix,
        terms=two,
        gates=shared(CHUNK, BLOCK, dtype=jnp.float32),
    )
    return launch(plan, inputs, scores, scratch)
