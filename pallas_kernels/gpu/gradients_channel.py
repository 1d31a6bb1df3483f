"""Cotangents of queries, keys and gates, for all chunks at once; a gate per channel.

As `pallas_kernels.gpu.gradients`, level by level (`pallas_kernels.gpu.levels`): with f the factors of a level and dP, dA
what it has of the cotangents of the scores,

    dQ += f (dP (f K))        dE += f (dA (f K))        dK += f (dP^T (f Q) + dA^T (f E))

In a level a token is right of a middle, where its query and erase key are decayed, or left, where its key is. So one product
of dP + dP^T, with rows of f Q and f K, has dQ in the rows on the right and dK in those on the left; of dA likewise.

The cotangent of a gate is gathered from every factor that holds it, `factor * d_factor`: the matrix that summed the gates of
a level, transposed, times what the level gives to the keys, times the keys. What reads the state at the start of the chunk
and what writes to the one at its end are two levels more.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels.gpu import products as mm
from pallas_kernels.gpu import warpgroup as wg
from pallas_kernels.gpu.arrays import BETA
from pallas_kernels.gpu.cotangents import WRITES, Cotangents, Gradients, Inputs, Products, Program, launch
from pallas_kernels.gpu.levels import END, SIZES, START, Taken, factors, meets, over_levels, taken_scratch, takes
from pallas_kernels.gpu.plan import BLOCK, CHUNK, Plan
from pallas_kernels.gpu.scores import DIAGONAL
from pallas_kernels.gpu.warpgroup import Ref


class GradientsChannelScratch(NamedTuple):
    """Matrices `[64, 64]`."""

    # Decayed, on the left keys, on the right queries and then erase keys, in parts; what they give to the gates, split.
    keys: Any
    taken: Taken  # which gates a factor takes


def gradients_channel(plan: Plan, inputs: Inputs) -> tuple[Gradients, Array]:
    def keys(here: Program, known: Products, scratch: GradientsChannelScratch, levels: Ref) -> Cotangents:
        q, k, erase = here.q, here.k, here.erase_key
        of_p, of_a = scratch.keys[: plan.split], scratch.keys[plan.split :]

        def gives(taken: Ref, terms: Array, d_gates: Array | None = None) -> Array:
            """Adds what the gates get from the factors whose gates are `taken`."""
            wg.put(scratch.keys[:2], terms)
            mm.commit()

            def run(total: mm.Sum) -> Array:
                if d_gates is not None:
                    total.start(d_gates)
                total.add((wg.turned(taken), scratch.keys[:2]))
                return total.value()

            return mm.with_sums(run, (CHUNK, BLOCK))

        scratch.taken.bring(levels, START)
        scratch.taken.bring(levels, END)
        taken = scratch.taken.arrived(START)
        factor = factors(here.gates, taken)
        d_q = known.d_q * factor * plan.scale
        terms = wg.read(q) * d_q
        d_erase: Any = None
        if plan.erases:
            d_erase = known.d_erase * (0.0 - factor)
            terms = terms + wg.read(erase) * d_erase
        d_gates = gives(taken, terms)
        taken = scratch.taken.arrived(END)
        d_k = known.d_k * factors(here.gates, taken)
        here.sums[WRITES] = jnp.sum(wg.read(k) * d_k, axis=1)
        d_k = d_k * wg.each_row(wg.along_rows(here.scalars.at[BETA]), BLOCK)
        d_gates = gives(taken, wg.read(k) * d_k, d_gates)
        scratch.taken.bring(levels, 0)
        if plan.erases and not plan.erase_heads:
            d_k, d_erase = d_k + d_erase, None
        diagonal = wg.each_row(wg.along_rows(here.of_scores.at[DIAGONAL]), BLOCK)
        d_q = d_q + diagonal * wg.read(k)
        d_k = d_k + diagonal * wg.read(q)
        row, _ = wg.indices(CHUNK, BLOCK)

        def of_level(level: Array, now: Any) -> Any:
            d_q, d_k, d_gates, d_erase = now
            taken, size = scratch.taken.arrived(level), lax.shift_left(1, level)
            pl.when(level + 1 < SIZES)(lambda: scratch.taken.bring(levels, level + 1))
            right = (row & size) > 0
            factor = factors(here.gates, taken)
            wg.put(of_p, jnp.where(right, wg.read(q), wg.read(k)) * factor)
            if plan.erases:
                wg.put(of_a, _erasing(plan, here, right) * factor)
            mm.commit()

            def run(for_p: mm.Sum, for_a: mm.Sum | None = None) -> list[Array]:
                for total, scores, keys in ((for_p, here.d_p, of_p), (for_a, here.d_a, of_a)):
                    if total is not None:
                        scores = jnp.where(meets(size, both_ways=True), wg.read(scores), 0.0)
                        total.add((wg.split_of(scores, plan.split), keys))
                return [total.value() * factor for total in (for_p, for_a) if total is not None]

            x, *others = mm.with_sums(run, *((CHUNK, BLOCK),) * (1 + plan.erases))
            terms = jnp.where(right, wg.read(q), wg.read(k)) * x
            d_q = d_q + jnp.where(right, x, 0.0)
            d_k = d_k + jnp.where(right, 0.0, x)
            for y in others:
                terms = terms + _erasing(plan, here, right) * y
                if d_erase is None:
                    d_k = d_k + y
                else:
                    d_erase = d_erase + jnp.where(right, y, 0.0)
                    d_k = d_k + jnp.where(right, 0.0, y)
            return d_q, d_k, gives(taken, terms, d_gates), d_erase

        d_q, d_k, d_gates, d_erase = over_levels(of_level, (d_q, d_k, d_gates, d_erase))
        return Cotangents(d_q, d_k, d_erase, d_gates)

    scratch = GradientsChannelScratch(keys=(wg.shared(CHUNK, CHUNK),) * (2 * plan.split), taken=taken_scratch())
    return launch(plan, inputs, keys, scratch, takes())


def _erasing(plan: Plan, here: Program, right: Array) -> Array:
    return jnp.where(right, wg.read(here.erase), wg.read(here.k)) if plan.erase_heads else wg.read(here.k)
