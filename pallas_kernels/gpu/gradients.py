"""Cotangents of queries, keys and scalars, for all chunks at once; no gate, or one a head.

With the symbols of `pallas_kernels.gpu.reverse` and `pallas_kernels.gpu.scores`, for the channels of a block of the key:

    dQ = scale exp(G) (dO S^T)  + dP through the scores  dE = -exp(G) (dB S^T) + dA through the scores
    dK = b exp(Z) (Y dS'^T)     + dA and dP through the scores
    db_j = Y_j . dB_j / b_j; where b_j = 0, the sum over what b_j scales: its columns of A and P, its key

The cotangent of a gate is gathered from every factor that holds it, `factor * d_factor` of the pairs around its token, the
reads after it, the writes before it and the whole; the short form q dq - k dk is a difference of large numbers.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array

from pallas_kernels.gpu import products as mm
from pallas_kernels.gpu import warpgroup as wg
from pallas_kernels.gpu.arrays import BETA, END, START
from pallas_kernels.gpu.cotangents import READS, WRITES, Cotangents, Gradients, Inputs, Products, Program, launch
from pallas_kernels.gpu.gradients_channel import gradients_channel
from pallas_kernels.gpu.plan import BLOCK, CHUNK, Plan


def gradients(plan: Plan, inputs: Inputs) -> tuple[Gradients, Array]:
    """The second result is the sums of `pallas_kernels.gpu.scores`."""
    if plan.gate == "channel":
        return gradients_channel(plan, inputs)

    def keys(here: Program, known: Products, *_: Any) -> Cotangents:
        def decayed(x: Array, kind: int) -> Array:
            return x * wg.each_row(wg.along_rows(here.scalars.at[kind]), BLOCK) if plan.gate == "head" else x

        d_q = decayed(known.d_q, START) * plan.scale
        terms = wg.read(here.q) * d_q
        d_k = decayed(known.d_k, END)
        here.sums[WRITES] = jnp.sum(wg.read(here.k) * d_k, axis=1)
        d_k = d_k * wg.each_row(wg.along_rows(here.scalars.at[BETA]), BLOCK)
        d_erase: Any = None
        if plan.erases:
            d_erase = 0.0 - decayed(known.d_erase, START)
            terms = terms + wg.read(here.erase_key) * d_erase
            if not plan.erase_heads:
                d_k = d_k + d_erase
        if plan.gate == "head":
            here.sums[READS] = jnp.sum(terms, axis=1)

        def run(q: mm.Sum, k: mm.Sum, erase: mm.Sum | None = None) -> Cotangents:
            q.start(d_q)
            q.add((wg.turned(here.d_p), here.k))
            k.start(d_k)
            k.add((here.d_p, here.q))
            if plan.erases:
                k.add((here.d_a, here.erase_key))
                if erase is not None:
                    erase.start(d_erase)
                (k if erase is None else erase).add((wg.turned(here.d_a), here.k))
            return Cotangents(q.value(), k.value(), None if erase is None else erase.value(), None)

        return mm.with_sums(run, *((CHUNK, BLOCK),) * (2 + (plan.erase_heads > 0)))

    return launch(plan, inputs, keys, ())
