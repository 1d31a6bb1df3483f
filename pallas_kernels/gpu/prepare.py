"""What a chunk of 64 tokens needs besides the state, for all chunks at once; no gate, or one a head.

With b = beta and G the sums of the gates of one chunk up to a token:

    A_ij = sum_d e_i k_j exp(G_i - G_j)   (i > j)        P_ij = scale sum_d q_i k_j exp(G_i - G_j)   (i >= j)
    X = (I + A diag(b))^-1

The decay exp(G_i - G_j) is the exponential of one product, (g_s for s <= i) with (1 for s > j): each exponent is a sum over
the very tokens between j and i, never a difference of two sums, so a gate of any size leaves its neighbours exact.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu import warpgroup as wg
from pallas_kernels.gpu.arrays import BETA, GATE, Prepared, Tokens, keys_of, prepared_shapes
from pallas_kernels.gpu.inverse import InverseScratch, inverse_scratch, invert
from pallas_kernels.gpu.plan import CHUNK, Plan
from pallas_kernels.gpu.prepare_channel import prepare_channel
from pallas_kernels.gpu.warpgroup import Ref


class PrepareScratch(NamedTuple):
    q: Ref  # [64, key]
    k: Ref
    erase: Ref
    scalars: Ref  # [kinds, 64]
    inverse: InverseScratch
    full: Ref


def prepare(plan: Plan, tokens: Tokens, *, for_backward: bool) -> Prepared:
    if plan.gate == "channel":
        return prepare_channel(plan, tokens, for_backward=for_backward)

    def body(tokens: Tokens, done: Prepared, here: PrepareScratch) -> None:
        batch, head, chunk = wg.place("batch", "head", "chunk")
        given, now = keys_of(plan, tokens, batch, head), pl.ds(chunk * CHUNK, CHUNK)
        copies = [(given.q.at[now], here.q), (given.k.at[now], here.k)]
        if plan.erase_heads:
            copies.append((given.erase.at[now], here.erase))
        wg.load(here.full, *copies, (tokens.scalars.at[batch, head, chunk], here.scalars))
        wg.loaded(here.full)
        decay = pair_decay(plan, here.scalars, here.inverse.lower, here.inverse.x)
        scores = [[(here.q, wg.turned(here.k))]]
        if plan.erases:
            scores.append([(here.erase if plan.erase_heads else here.k, wg.turned(here.k))])
        p, *others = wg.products(*scores)
        here_p, here_a = ((here.inverse.joined.at[n], here.inverse.lower.at[n])[: len(done.p)] for n in (0, 1))
        wg.put_split(here_p, p * decay * plan.scale)
        copies = [(x, y.at[batch, head, chunk]) for x, y in zip(here_p, done.p, strict=True)]
        if plan.erases:
            row, column = wg.indices(CHUNK, CHUNK)
            a = jnp.where(row > column, others[0] * decay, 0.0)
        if done.a is not None:
            wg.put_split(here_a, a)
            copies += [(x, y.at[batch, head, chunk]) for x, y in zip(here_a, done.a, strict=True)]
        wg.store(*copies)
        if plan.erases:
            wg.stored()
            invert(a * wg.each_column(wg.along_columns(here.scalars.at[BETA]), CHUNK), here.inverse)
            wg.store(*((here.inverse.x.at[part], done.x.at[batch, head, chunk, part]) for part in (0, 1)))
        wg.stored(and_written=True)

    keys = wg.shared(CHUNK, plan.key)
    return wg.kernel(
        body,
        tokens._replace(v=None),
        prepared_shapes(plan, for_backward=for_backward),
        PrepareScratch(
            q=keys,
            k=keys,
            erase=keys if plan.erase_heads else None,
            scalars=wg.vectors(*tokens.scalars.shape[-2:]),
            inverse=inverse_scratch(),
            full=plgpu.Barrier(num_arrivals=4 if plan.erase_heads else 3),
        ),
        {"chunk": plan.chunks, "head": plan.heads, "batch": plan.batch},
        "delta_rule_prepare",
    )


def pair_decay(plan: Plan, scalars: Ref, gates: Ref, after: Ref) -> Array:
    """exp(sum of the gates of a head over (j, i]) for i >= j, else 0; the last two references are scratch `[2, 64, 64]`."""
    row, column = wg.indices(CHUNK, CHUNK)
    if plan.gate != "head":
        return jnp.where(row >= column, 1.0, 0.0)
    wg.put_split(gates, jnp.where(row >= column, wg.each_column(wg.along_columns(scalars.at[GATE]), CHUNK), 0.0))
    wg.put(after.at[0], jnp.where(row > column, 1.0, 0.0))
    plgpu.commit_smem()
    total = wg.product((gates.at[0], after.at[0]), (gates.at[1], after.at[0]))
    return jnp.exp2(jnp.where(row >= column, total, -1e30))
