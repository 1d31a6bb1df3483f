"""Cotangents of queries, keys, scores and scalars, for all chunks at once; no gate, or one a head.

With the symbols of `pallas_kernels.gpu.reverse`, for the channels of a block of the key:

    dA = -dB Y^T diag(b)   (i > j)                       dP = scale dO Y^T diag(b)   (i >= j)
    dQ = scale exp(G) (dO S^T)  + dP through the scores  dE = -exp(G) (dB S^T) + dA through the scores
    dK = b exp(Z) (Y dS'^T)     + dA and dP through the scores
    db_j = Y_j . dB_j / b_j; where b_j = 0, the sum over what b_j scales: its columns of A and P, its key

The cotangent of a gate is gathered from every factor that holds it, `factor * d_factor` of the pairs around its token, the
reads after it, the writes before it and the whole; the short form q dq - k dk is a difference of large numbers.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu import warpgroup as wg
from pallas_kernels.gpu.arrays import BETA, END, START
from pallas_kernels.gpu.cotangents import (
    COLUMNS,
    PAIRS,
    READS,
    WRITES,
    Cotangents,
    Gradients,
    Inputs,
    Products,
    Program,
    launch,
)
from pallas_kernels.gpu.gradients_channel import gradients_channel
from pallas_kernels.gpu.plan import BLOCK, CHUNK, Plan
from pallas_kernels.gpu.prepare import pair_decay
from pallas_kernels.gpu.warpgroup import Ref


class GradientsScratch(NamedTuple):
    """Matrices `[2, 64, 64]`."""

    scores: Ref  # dP and dA; before them what is summed over pairs: gates for their decay
    other: Ref  # where gates are taken for the decay; then the terms of pairs, split


def gradients(plan: Plan, inputs: Inputs) -> Gradients:
    if plan.gate == "channel":
        return gradients_channel(plan, inputs)

    def scores(here: Program, known: Products, scratch: GradientsScratch) -> Cotangents:
        row, column = wg.indices(CHUNK, CHUNK)
        beta = wg.each_column(wg.along_columns(here.scalars.at[BETA]), CHUNK)
        if plan.gate == "head":
            wg.put(scratch.other.at[0], jnp.where(row > column, 1.0, 0.0))
        decay = pair_decay(plan, here.scalars, scratch.scores, scratch.other.at[0]) * beta
        terms = known.d_p * wg.read_split(here.p)
        if plan.erases:
            terms = terms - known.d_a * wg.read_split(here.a)
        here.sums[COLUMNS] = jnp.sum(terms, axis=0)
        if plan.gate == "head":
            wg.put_split(scratch.other, terms * beta)
            wg.put(scratch.scores.at[0], jnp.where(row < column, 1.0, 0.0))
            plgpu.commit_smem()
            crossing = wg.product(
                *((part, scratch.scores.at[0]) for part in (scratch.other.at[0], scratch.other.at[1]))
            )
            here.sums[PAIRS] = jnp.sum(jnp.where(row >= column, crossing, 0.0), axis=0)
        wg.put(scratch.scores.at[0], known.d_p * decay * plan.scale)
        if plan.erases:
            wg.put(scratch.scores.at[1], jnp.where(row > column, -known.d_a * decay, 0.0))
        plgpu.commit_smem()
        d_p, d_a = scratch.scores.at[0], scratch.scores.at[1]

        def decayed(x: Array, kind: int) -> Array:
            return x * wg.each_row(wg.along_rows(here.scalars.at[kind]), BLOCK) if plan.gate == "head" else x

        d_read = decayed(known.d_q, START) * plan.scale
        terms = wg.read(here.q) * d_read
        d_q = wg.product((d_p, here.k)) + d_read
        d_write = decayed(known.d_k, END)
        here.sums[WRITES] = jnp.sum(wg.read(here.k) * d_write, axis=1)
        d_write = d_write * wg.each_row(wg.along_rows(here.scalars.at[BETA]), BLOCK)
        pairs, d_erase = [(wg.turned(d_p), here.q)], None
        if plan.erases:
            d_read = decayed(known.d_erase, START)
            terms = terms - wg.read(here.erase_key) * d_read
            d_erase = wg.product((d_a, here.k)) - d_read
            pairs.append((wg.turned(d_a), here.erase_key))
        if plan.gate == "head":
            here.sums[READS] = jnp.sum(terms, axis=1)
        return Cotangents(d_q, wg.product(*pairs) + d_write, d_erase, None)

    matrix = wg.shared(2, CHUNK, CHUNK)
    return launch(plan, inputs, scores, GradientsScratch(matrix, matrix))
