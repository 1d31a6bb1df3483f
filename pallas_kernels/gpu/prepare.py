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

from pallas_kernels.gpu import warpgroup as wg
from pallas_kernels.gpu.arrays import GATE, Prepared, Tokens, keys_of, prepared_shapes
from pallas_kernels.gpu.inverse import finish
from pallas_kernels.gpu.plan import CHUNK, Plan
from pallas_kernels.gpu.prepare_channel import prepare_channel
from pallas_kernels.gpu.warpgroup import Ref


class PrepareScratch(NamedTuple):
    scalars: Ref  # [kinds, 64]
    p: Any  # in parts, [64, 64]
    a: Any
    full: Ref


class ScoresScratch(NamedTuple):
    """What the inverse has no use for, which then has its place."""

    q: Ref  # [64, key]
    k: Ref
    erase: Ref
    gates: Ref  # [2, 64, 64]
    after: Ref  # where the row is after the column: ones, [64, 64]


def prepare(plan: Plan, tokens: Tokens, *, for_backward: bool) -> Prepared:
    if plan.gate == "channel":
        return prepare_channel(plan, tokens, for_backward=for_backward)

    def body(inputs: tuple[Tokens, Ref], done: Prepared, here: PrepareScratch) -> None:
        tokens, after = inputs
        batch, head, chunk = wg.place("batch", "head", "chunk")
        given, now = keys_of(plan, tokens, batch, head), pl.ds(chunk * CHUNK, CHUNK)

        def scores(keys: ScoresScratch) -> list[Array]:
            copies = [(given.q.at[now], keys.q), (given.k.at[now], keys.k)]
            if plan.erase_heads:
                copies.append((given.erase.at[now], keys.erase))
            if after is not None:
                copies.append((after, keys.after))
            wg.load(here.full, *copies, (tokens.scalars.at[batch, head, chunk], here.scalars))
            wg.loaded(here.full)
            pairs = [[(keys.q, wg.turned(keys.k))]]
            if plan.erases:
                pairs.append([(keys.erase if plan.erase_heads else keys.k, wg.turned(keys.k))])

            decay = pair_decay(plan, here.scalars, keys.gates, keys.after)
            return [x * decay for x in wg.products(*pairs)]

        tile = wg.shared(CHUNK, plan.key)
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
        wg.put_split(here.p, p * plan.scale)
        copies = [(x, y.at[batch, head, chunk]) for x, y in zip(here.p, done.p, strict=True)]
        if done.a is not None:
            row, column = wg.indices(CHUNK, CHUNK)
            wg.put_split(here.a, jnp.where(row > column, others[0], 0.0))
            copies += [(x, y.at[batch, head, chunk]) for x, y in zip(here.a, done.a, strict=True)]
        wg.store(*copies)
        finish(others[0] if plan.erases else None, here.scalars, lambda part: done.x.at[batch, head, chunk, part])

    gated = plan.gate == "head"
    results = prepared_shapes(plan, for_backward=for_backward)
    matrix = wg.shared(CHUNK, CHUNK)
    return wg.kernel(
        body,
        (tokens._replace(v=None), jnp.asarray(np.tri(CHUNK, k=-1), jnp.bfloat16) if gated else None),
        results,
        PrepareScratch(
            scalars=wg.vectors(*tokens.scalars.shape[-2:]),
            p=(matrix,) * len(results.p),
            a=None if results.a is None else (matrix,) * len(results.a),
            full=plgpu.Barrier(num_arrivals=3 + (plan.erase_heads > 0) + gated),
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
    wg.put_split(gates, jnp.where(row >= column, wg.each_column(wg.along_columns(scalars.at[GATE]), CHUNK), 0.0))
    plgpu.commit_smem()
    total = wg.product(*((part, after) for part in wg.parts(gates)))
    return jnp.exp2(jnp.where(row >= column, total, -1e30))
