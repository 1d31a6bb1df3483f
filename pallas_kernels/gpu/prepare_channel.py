"""What a chunk of 64 tokens needs besides the state, for all chunks at once; a gate per channel.

Scores are summed over the levels of `pallas_kernels.gpu.levels` and over blocks of the key's channels. Besides A, P and X
(see `pallas_kernels.gpu.prepare`) this writes the keys as the state meets them, with G and Z the sums of the gates of the
chunk up to and after a token: scale exp(G) Q, exp(G) E, exp(Z) K, and exp(G_64), so that no other pass needs gates.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu import warpgroup as wg
from pallas_kernels.gpu.arrays import Operands, Prepared, Tokens, keys_of, prepared_shapes
from pallas_kernels.gpu.inverse import finish
from pallas_kernels.gpu.levels import factors, meets, over_levels
from pallas_kernels.gpu.plan import BLOCK, CHUNK, Plan
from pallas_kernels.gpu.warpgroup import Ref


class PrepareChannelScratch(NamedTuple):
    scalars: Ref  # [kinds, 64]
    p: Ref  # [64, 64]
    a: Ref  # None where it is not wanted
    scalars_full: Ref


class ScoresChannelScratch(NamedTuple):
    """What the inverse has no use for, which then has its place."""

    keys: Operands  # [64, 64]
    decayed: Operands  # [64, 64]
    gates: Ref  # [2, 64, 64]
    takes: Ref  # which gates a factor takes, [64, 64]
    whole: Ref  # exp(G_64), [64]
    full: Ref


def prepare_channel(plan: Plan, tokens: Tokens, *, for_backward: bool) -> Prepared:
    def body(tokens: Tokens, done: Prepared, here: PrepareChannelScratch) -> None:
        batch, head, chunk = wg.place("batch", "head", "chunk")
        now = (batch, pl.ds(chunk * CHUNK, CHUNK), head)
        wg.load(here.scalars_full, (tokens.scalars.at[batch, head, chunk], here.scalars))

        def of_all(scratch: ScoresChannelScratch) -> tuple[Array, Array]:
            def channels_of(block: Array, scores: tuple[Array, Array]) -> tuple[Array, Array]:
                wg.stored()
                channels = pl.ds(block * BLOCK, BLOCK)
                _fetch(plan, tokens, scratch, batch, head, chunk, channels)
                scores = _scores(plan, scratch, scratch.takes, *scores)
                _decay_keys(plan, scratch, scratch.takes)
                copies = [
                    (scratch.decayed.q, done.query_in.at[(*now, channels)]),
                    (scratch.decayed.k, done.keys_out.at[(*now, channels)]),
                    (scratch.whole, done.whole.at[batch, head, chunk, channels]),
                ]
                if plan.erases:
                    copies.append((scratch.decayed.erase, done.erase_in.at[(*now, channels)]))
                wg.store(*copies)
                return scores

            nothing = wg.zeros(CHUNK, CHUNK), wg.zeros(CHUNK, CHUNK)
            scores = lax.fori_loop(0, plan.key_blocks, channels_of, nothing)
            wg.stored()
            return scores

        tile = wg.shared(CHUNK, BLOCK)
        p, a = pl.run_scoped(
            of_all,
            ScoresChannelScratch(
                keys=Operands(tile, tile, tile if plan.erase_heads else None),
                decayed=Operands(tile, tile, tile if plan.erases else None),
                gates=wg.shared(2, CHUNK, BLOCK),
                takes=tile,
                whole=wg.vectors(BLOCK),
                full=plgpu.Barrier(num_arrivals=4 + (plan.erase_heads > 0)),
            ),
            collective_axes="warpgroup",
        )
        wg.put(here.p, p * plan.scale)
        copies = [(here.p, done.p[0].at[batch, head, chunk])]
        if done.a is not None:
            wg.put(here.a, a)
            copies.append((here.a, done.a[0].at[batch, head, chunk]))
        wg.store(*copies)
        wg.loaded(here.scalars_full)
        finish(a if plan.erases else None, here.scalars, lambda part: done.x.at[batch, head, chunk, part])

    matrix = wg.shared(CHUNK, CHUNK)
    results = prepared_shapes(plan, for_backward=for_backward)
    return wg.kernel(
        body,
        tokens._replace(v=None),
        results,
        PrepareChannelScratch(
            scalars=wg.vectors(*tokens.scalars.shape[-2:]),
            p=matrix,
            a=None if results.a is None else matrix,
            scalars_full=plgpu.Barrier(),
        ),
        {"chunk": plan.chunks, "head": plan.heads, "batch": plan.batch},
        "delta_rule_prepare",
    )


def _fetch(
    plan: Plan, tokens: Tokens, here: ScoresChannelScratch, batch: Array, head: Array, chunk: Array, channels: pl.Slice
) -> None:
    given, now = keys_of(plan, tokens, batch, head), pl.ds(chunk * CHUNK, CHUNK)
    copies = [(given.q.at[now, channels], here.keys.q), (given.k.at[now, channels], here.keys.k)]
    copies += [(tokens.gates.at[part, batch, now, head, channels], here.gates.at[part]) for part in (0, 1)]
    if plan.erase_heads:
        copies.append((given.erase.at[now, channels], here.keys.erase))
    wg.load(here.full, *copies)
    wg.loaded(here.full)


def _scores(plan: Plan, here: ScoresChannelScratch, matrix: Ref, p: Array, a: Array) -> tuple[Array, Array]:
    """P without its scale, and A, with what these channels give."""
    row, column = wg.indices(CHUNK, CHUNK)
    keys, decayed = here.keys, here.decayed
    p = p + jnp.where(row == column, wg.product((keys.q, wg.turned(keys.k))), 0.0)

    def level(size: Array, now: tuple[Array, Array]) -> tuple[Array, Array]:
        p, a = now
        factor = factors(size, here.gates, matrix)
        wg.put(decayed.q, wg.read(keys.q) * factor)
        wg.put(decayed.k, wg.read(keys.k) * factor)
        erase = decayed.k
        if plan.erase_heads:
            erase = decayed.erase
            wg.put(erase, wg.read(keys.erase) * factor)
        plgpu.commit_smem()
        p = p + jnp.where(meets(size), wg.product((decayed.q, wg.turned(decayed.k))), 0.0)
        if plan.erases:
            a = a + jnp.where(meets(size), wg.product((erase, wg.turned(decayed.k))), 0.0)
        return p, a

    return over_levels(level, (p, a))


def _decay_keys(plan: Plan, here: ScoresChannelScratch, matrix: Ref) -> None:
    """Leaves the keys as the state meets them, and the decay of the whole chunk."""
    start = factors("start", here.gates, matrix)
    wg.put(here.decayed.q, wg.read(here.keys.q) * (start * plan.scale))
    if plan.erases:
        wg.put(here.decayed.erase, wg.read(here.keys.erase if plan.erase_heads else here.keys.k) * start)
    row, _ = wg.indices(CHUNK, BLOCK)
    here.whole[...] = jnp.sum(jnp.where(row == CHUNK - 1, start, 0.0), axis=0)
    plgpu.commit_smem()
    wg.put(here.decayed.k, wg.read(here.keys.k) * factors("end", here.gates, matrix))
