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

from pallas_kernels.gpu.arrays import BETA, GATE, Prepared, Tokens, keys_of, prepared_shapes
from pallas_kernels.gpu.inverse import invert
from pallas_kernels.gpu.plan import CHUNK, Plan
from pallas_kernels.gpu.prepare_channel import prepare_channel
from pallas_kernels.gpu.warpgroup import (
    Ref,
    along_columns,
    each_column,
    indices,
    kernel,
    load,
    loaded,
    place,
    product,
    products,
    put,
    put_split,
    shared,
    store,
    stored,
    turned,
    vectors,
)


class Scratch(NamedTuple):
    q: Ref  # [64, key]
    k: Ref
    erase: Ref
    scalars: Ref  # [kinds, 64]
    matrices: tuple[Ref, Ref, Ref]  # [2, 64, 64]
    full: Ref


def prepare(plan: Plan, tokens: Tokens, *, for_backward: bool) -> Prepared:
    if plan.gate == "channel":
        return prepare_channel(plan, tokens, for_backward=for_backward)

    def body(tokens: Tokens, done: Prepared, here: Scratch) -> None:
        batch, head, chunk = place("batch", "head", "chunk")
        one, two, three = here.matrices
        given, now = keys_of(plan, tokens, batch, head), pl.ds(chunk * CHUNK, CHUNK)
        copies = [(given.q.at[now], here.q), (given.k.at[now], here.k)]
        if plan.erase_heads:
            copies.append((given.erase.at[now], here.erase))
        load(here.full, *copies, (tokens.scalars.at[batch, head, chunk], here.scalars))
        loaded(here.full)
        decay = pair_decay(plan, here.scalars, one, two)
        scores = [[(here.q, turned(here.k))]]
        if plan.erases:
            scores.append([(here.erase if plan.erase_heads else here.k, turned(here.k))])
        p, *others = products(*scores)
        here_p, here_a = ((three.at[n], one.at[n])[: len(done.p)] for n in (0, 1))
        put_split(here_p, p * decay * plan.scale)
        copies = [(x, y.at[batch, head, chunk]) for x, y in zip(here_p, done.p, strict=True)]
        if plan.erases:
            row, column = indices(CHUNK, CHUNK)
            a = jnp.where(row > column, others[0] * decay, 0.0)
        if done.a is not None:
            put_split(here_a, a)
            copies += [(x, y.at[batch, head, chunk]) for x, y in zip(here_a, done.a, strict=True)]
        store(*copies)
        if plan.erases:
            stored()
            invert(a * each_column(along_columns(here.scalars.at[BETA]), CHUNK), one, two, three)
            store(*((two.at[part], done.x.at[batch, head, chunk, part]) for part in (0, 1)))
        stored(and_written=True)

    keys, matrix = shared(CHUNK, plan.key), shared(2, CHUNK, CHUNK, swizzle=32)
    return kernel(
        body,
        tokens._replace(v=None),
        prepared_shapes(plan, for_backward=for_backward),
        Scratch(
            q=keys,
            k=keys,
            erase=keys if plan.erase_heads else None,
            scalars=vectors(*tokens.scalars.shape[-2:]),
            matrices=(matrix,) * 3,
            full=plgpu.Barrier(num_arrivals=4 if plan.erase_heads else 3),
        ),
        {"chunk": plan.chunks, "head": plan.heads, "batch": plan.batch},
        "delta_rule_prepare",
    )


def pair_decay(plan: Plan, scalars: Ref, gates: Ref, after: Ref) -> Array:
    """exp(sum of the gates of a head over (j, i]) for i >= j, else 0; the last two references are scratch `[2, 64, 64]`."""
    row, column = indices(CHUNK, CHUNK)
    if plan.gate != "head":
        return jnp.where(row >= column, 1.0, 0.0)
    put_split(gates, jnp.where(row >= column, each_column(along_columns(scalars.at[GATE]), CHUNK), 0.0))
    put(after.at[0], jnp.where(row > column, 1.0, 0.0))
    plgpu.commit_smem()
    total = product((gates.at[0], after.at[0]), (gates.at[1], after.at[0]))
    return jnp.exp2(jnp.where(row >= column, total, -1e30))
