"""What a chunk of 64 tokens needs besides the state, for all chunks at once; no gate, or one a head.

With b = beta and G the sums of the gates of one chunk up to a token:

    A_ij = sum_d e_i k_j exp(G_i - G_j)   (i > j)        P_ij = scale sum_d q_i k_j exp(G_i - G_j)   (i >= j)
    X = (I + A diag(b))^-1

The decay exp(G_i - G_j) is the exponential of one product, (g_s for s <= i) with (1 for s > j): each exponent is a sum over
the very tokens between j and i, never a difference of two sums, so a gate of any size leaves its neighbours exact.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu import products as mm
from pallas_kernels.gpu import warpgroup as wg
from pallas_kernels.gpu.arrays import GATE, Prepared, Tokens, keys_of, places_of, prepared_shapes
from pallas_kernels.gpu.inverse import finish
from pallas_kernels.gpu.plan import CHUNK, Plan
from pallas_kernels.gpu.prepare_channel import prepare_channel
from pallas_kernels.gpu.warpgroup import Ref


class PrepareScratch(NamedTuple):
    scalars: Ref  # [kinds, 64]
    full: Ref


class ScoresScratch(NamedTuple):
    """What scores and their inverse have no use for, which then have its place."""

    q: Any  # [64, key] each
    k: Any
    erase: Any
    gates: Ref  # [2, 64, 64]
    after: Ref  # where the row is after the column: ones, [64, 64]


def prepare(plan: Plan, tokens: Tokens, *, for_backward: bool) -> Prepared:
    if plan.gate == "channel":
        return prepare_channel(plan, tokens, for_backward=for_backward)

    def body(inputs: tuple[Tokens, Ref], done: Prepared, here: PrepareScratch) -> None:
        tokens, after = inputs
        batch, head, chunk = wg.place("batch", "head", "chunk")
        given = keys_of(plan, tokens, batch, head, pl.ds(chunk * CHUNK, CHUNK))

        def scores(keys: ScoresScratch) -> list[Array]:
            copies = [(given.q, keys.q), (given.k, keys.k)]
            if plan.erase_heads:
                copies.append((given.erase, keys.erase))
            if after is not None:
                copies.append((after, keys.after))
            wg.load(here.full, *copies, (tokens.scalars.at[batch, head, chunk], here.scalars))
            wg.loaded(here.full)
            pairs: list[mm.Pairs] = [[(keys.q, wg.turned(keys.k))]]
            if plan.erases:
                pairs.append([(keys.erase if plan.erase_heads else keys.k, wg.turned(keys.k))])

            decay = pair_decay(plan, here.scalars, keys.gates, keys.after)
            return [x * decay for x in mm.products(*pairs)]

        tile = (wg.shared(CHUNK, plan.key),) * plan.split
        p, *others = pl.run_scoped(
            scores,
            ScoresScratch(
                q=tile,
                k=tile,
                erase=tile if plan.erase_heads else None,
                gates=wg.shared(2, CHUNK, CHUNK) if gated else None,
                after=wg.shared(CHUNK, CHUNK) if gated else None,
            ),
            collective_axes="warpgroup",
        )

        def leave(of_p: Any, of_a: Any) -> None:
            wg.put(of_p, p * plan.scale)
            copies = [(of_p, places_of(done.p, (batch, head, chunk)))]
            if done.a is not None:
                row, column = wg.indices(CHUNK, CHUNK)
                wg.put(of_a, jnp.where(row > column, others[0], 0.0))
                copies.append((of_a, places_of(done.a, (batch, head, chunk))))
            wg.store(*copies)
            finish(others[0] if plan.erases else None, here.scalars, lambda part: done.x.at[batch, head, chunk, part])

        matrix = wg.shared(CHUNK, CHUNK)
        tiles = ((matrix,) * len(results.p), () if results.a is None else (matrix,) * len(results.a))
        pl.run_scoped(leave, *tiles, collective_axes="warpgroup")

    gated = plan.gate == "head"
    results = prepared_shapes(plan, for_backward=for_backward)
    return wg.kernel(
        plan.machine,
        body,
        (tokens._replace(v=None), jnp.asarray(np.tri(CHUNK, k=-1), jnp.bfloat16) if gated else None),
        results,
        PrepareScratch(
            scalars=wg.vectors(plan.kinds, CHUNK),
            full=plgpu.Barrier(num_arrivals=1 + gated + plan.split * (2 + (plan.erase_heads > 0))),
        ),
        {"chunk": plan.chunks, "head": plan.heads, "batch": plan.batch},
        "delta_rule_prepare",
    )


def pair_decay(plan: Plan, scalars: Ref, gates: Ref, after: Ref) -> Array:
    """exp(sum of the gates of a head over (j, i]) for i >= j, else 0.

    `gates` is scratch `[2, 64, 64]`, and `after` `[64, 64]` has ones where i > j.
    """
    row, column = wg.indices(CHUNK, CHUNK)
    if plan.gate != "head":
        return jnp.where(row >= column, 1.0, 0.0)
    wg.put(
        wg.along_first(gates), jnp.where(row >= column, wg.each_column(wg.along_columns(scalars.at[GATE]), CHUNK), 0.0)
    )
    mm.commit()
    total = mm.product((wg.along_first(gates), after))
    return jnp.exp2(jnp.where(row >= column, total, -1e30))
