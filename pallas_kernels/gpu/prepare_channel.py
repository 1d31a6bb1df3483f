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
from pallas_kernels.gpu.arrays import BETA, Operands, Prepared, Tokens, keys_of, prepared_shapes
from pallas_kernels.gpu.inverse import InverseScratch, inverse_scratch, invert
from pallas_kernels.gpu.levels import factors, meets, over_levels
from pallas_kernels.gpu.plan import BLOCK, CHUNK, Plan
from pallas_kernels.gpu.warpgroup import Ref


class PrepareChannelScratch(NamedTuple):
    keys: Operands  # [64, 64]
    decayed: Operands  # [64, 64]
    gates: Ref  # [2, 64, 64]
    takes: Ref  # which gates a factor takes, [64, 64]
    scalars: Ref  # [kinds, 64]
    inverse: InverseScratch
    whole: Ref  # exp(G_64), [64]
    full: Ref
    scalars_full: Ref


def prepare_channel(plan: Plan, tokens: Tokens, *, for_backward: bool) -> Prepared:
    def body(tokens: Tokens, done: Prepared, here: PrepareChannelScratch) -> None:
        batch, head, chunk = wg.place("batch", "head", "chunk")
        here_p, here_a = (here.inverse.joined.at[n] for n in (0, 1))
        now = (batch, pl.ds(chunk * CHUNK, CHUNK), head)
        wg.load(here.scalars_full, (tokens.scalars.at[batch, head, chunk], here.scalars))

        def channels_of(block: Array, scores: tuple[Array, Array]) -> tuple[Array, Array]:
            wg.stored()
            channels = pl.ds(block * BLOCK, BLOCK)
            _fetch(plan, tokens, here, batch, head, chunk, channels)
            scores = _scores(plan, here, here.takes, *scores)
            _decay_keys(plan, here, here.takes)
            copies = [
                (here.decayed.q, done.query_in.at[(*now, channels)]),
                (here.decayed.k, done.keys_out.at[(*now, channels)]),
                (here.whole, done.whole.at[batch, head, chunk, channels]),
            ]
            if plan.erases:
                copies.append((here.decayed.erase, done.erase_in.at[(*now, channels)]))
            wg.store(*copies)
            return scores

        p, a = lax.fori_loop(0, plan.key_blocks, channels_of, (wg.zeros(CHUNK, CHUNK), wg.zeros(CHUNK, CHUNK)))
        wg.put(here_p, p * plan.scale)
        copies = [(here_p, done.p[0].at[batch, head, chunk])]
        if done.a is not None:
            wg.put(here_a, a)
            copies.append((here_a, done.a[0].at[batch, head, chunk]))
        wg.store(*copies)
        wg.loaded(here.scalars_full)
        if plan.erases:
            wg.stored()
            invert(a * wg.each_column(wg.along_columns(here.scalars.at[BETA]), CHUNK), here.inverse)
            wg.store(*((here.inverse.x.at[part], done.x.at[batch, head, chunk, part]) for part in (0, 1)))
        wg.stored(and_written=True)

    tile = wg.shared(CHUNK, BLOCK)
    return wg.kernel(
        body,
        tokens._replace(v=None),
        prepared_shapes(plan, for_backward=for_backward),
        PrepareChannelScratch(
            keys=Operands(tile, tile, tile if plan.erase_heads else None),
            decayed=Operands(tile, tile, tile if plan.erases else None),
            gates=wg.shared(2, CHUNK, BLOCK),
            takes=tile,
            scalars=wg.vectors(*tokens.scalars.shape[-2:]),
            inverse=inverse_scratch(),
            whole=wg.vectors(BLOCK),
            full=plgpu.Barrier(num_arrivals=4 + (plan.erase_heads > 0)),
            scalars_full=plgpu.Barrier(),
        ),
        {"chunk": plan.chunks, "head": plan.heads, "batch": plan.batch},
        "delta_rule_prepare",
    )


def _fetch(
    plan: Plan, tokens: Tokens, here: PrepareChannelScratch, batch: Array, head: Array, chunk: Array, channels: pl.Slice
) -> None:
    given, now = keys_of(plan, tokens, batch, head), pl.ds(chunk * CHUNK, CHUNK)
    copies = [(given.q.at[now, channels], here.keys.q), (given.k.at[now, channels], here.keys.k)]
    copies += [(tokens.gates.at[part, batch, now, head, channels], here.gates.at[part]) for part in (0, 1)]
    if plan.erase_heads:
        copies.append((given.erase.at[now, channels], here.keys.erase))
    wg.load(here.full, *copies)
    wg.loaded(here.full)


def _scores(plan: Plan, here: PrepareChannelScratch, matrix: Ref, p: Array, a: Array) -> tuple[Array, Array]:
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


def _decay_keys(plan: Plan, here: PrepareChannelScratch, matrix: Ref) -> None:
    """Leaves the keys as the state meets them, and the decay of the whole chunk."""
    start = factors("start", here.gates, matrix)
    wg.put(here.decayed.q, wg.read(here.keys.q) * (start * plan.scale))
    if plan.erases:
        wg.put(here.decayed.erase, wg.read(here.keys.erase if plan.erase_heads else here.keys.k) * start)
    row, _ = wg.indices(CHUNK, BLOCK)
    here.whole[...] = jnp.sum(jnp.where(row == CHUNK - 1, start, 0.0), axis=0)
    plgpu.commit_smem()
    wg.put(here.decayed.k, wg.read(here.keys.k) * factors("end", here.gates, matrix))
