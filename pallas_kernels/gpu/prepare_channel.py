"""What a chunk of 64 tokens needs besides the state, for all chunks at once; a gate per channel.

Scores are summed over the levels of `pallas_kernels.gpu.levels` and over blocks of the key's channels. Besides A, P and X
(see `pallas_kernels.gpu.prepare`) this writes the keys as the state meets them, with G and Z the sums of the gates of the
chunk up to and after a token: scale exp(G) Q, exp(G) E, exp(Z) K, and exp(G_64), so that no other pass needs gates.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu import warpgroup as wg
from pallas_kernels.gpu.arrays import Operands, Prepared, Tokens, keys_of, prepared_shapes
from pallas_kernels.gpu.inverse import finish
from pallas_kernels.gpu.levels import END, START, Taken, factors, meets, over_levels, put_gates, taken_scratch, takes
from pallas_kernels.gpu.plan import BLOCK, CHUNK, Plan
from pallas_kernels.gpu.warpgroup import Ref


class PrepareChannelScratch(NamedTuple):
    scalars: Ref  # [kinds, 64]
    scalars_full: Ref


class ScoresChannelScratch(NamedTuple):
    """What the inverse has no use for, which then has its place."""

    keys: Operands  # [64, key]
    gates: Ref  # [2, 64, key]
    tiles: Ref  # decayed keys of a block of channels, [2, 64, 64]
    taken: Taken
    whole: Ref  # exp(G_64), [64]
    full: Ref


def prepare_channel(plan: Plan, tokens: Tokens, *, for_backward: bool) -> Prepared:
    def body(inputs: tuple[Tokens, Ref], done: Prepared, here: PrepareChannelScratch) -> None:
        tokens, levels = inputs
        batch, head, chunk = wg.place("batch", "head", "chunk")
        wg.load(here.scalars_full, (tokens.scalars.at[batch, head, chunk], here.scalars))

        def of_all(scratch: ScoresChannelScratch) -> list[Array]:
            scratch.taken.bring(levels, 0)
            _fetch(plan, tokens, scratch, batch, head, chunk)
            scores = _scores(plan, scratch, levels)
            scratch.taken.bring(levels, START)
            _decay_keys(plan, scratch, done, batch, head, chunk)
            return scores

        def wide(*shape: int) -> Any:
            return wg.shared(*shape, CHUNK, plan.key)

        own = plan.erase_heads > 0
        scores = pl.run_scoped(
            of_all,
            ScoresChannelScratch(
                keys=Operands(wide(), wide(), wide() if own else None),
                gates=wide(2),
                tiles=wg.shared(2, CHUNK, BLOCK),
                taken=taken_scratch(),
                whole=wg.vectors(BLOCK),
                full=plgpu.Barrier(num_arrivals=2 + own),
            ),
            collective_axes="warpgroup",
        )

        def leave(*tiles: Ref) -> None:
            p, *a = scores
            copies = []
            results = [(p * plan.scale, done.p), *((x, done.a) for x in a)]
            for (x, result), tile in zip(results, tiles, strict=False):
                wg.put(tile, x)
                copies.append((tile, result[0].at[batch, head, chunk]))
            wg.store(*copies)
            wg.loaded(here.scalars_full)
            finish(a[0] if a else None, here.scalars, lambda part: done.x.at[batch, head, chunk, part])

        pl.run_scoped(leave, *(wg.shared(CHUNK, CHUNK),) * (1 + (done.a is not None)), collective_axes="warpgroup")

    return wg.kernel(
        body,
        (tokens._replace(v=None), takes()),
        prepared_shapes(plan, for_backward=for_backward),
        PrepareChannelScratch(scalars=wg.vectors(*tokens.scalars.shape[-2:]), scalars_full=plgpu.Barrier()),
        {"chunk": plan.chunks, "head": plan.heads, "batch": plan.batch},
        "delta_rule_prepare",
    )


def _fetch(plan: Plan, tokens: Tokens, here: ScoresChannelScratch, batch: Array, head: Array, chunk: Array) -> None:
    given, now = keys_of(plan, tokens, batch, head), pl.ds(chunk * CHUNK, CHUNK)
    copies = [(given.q.at[now], here.keys.q), (given.k.at[now], here.keys.k)]
    if plan.erase_heads:
        copies.append((given.erase.at[now], here.keys.erase))
    wg.load(here.full, *copies)
    for block in range(plan.key_blocks):
        put_gates(_block(here, block)[1], tokens.gates.at[batch, now, head, pl.ds(block * BLOCK, BLOCK)])
    plgpu.commit_smem()
    wg.loaded(here.full)


def _block(here: ScoresChannelScratch, block: int | Array) -> tuple[Operands, Ref]:
    """The keys and the gates of a block of channels."""
    channels = pl.ds(block * BLOCK, BLOCK)
    keys = Operands(*(None if x is None else x.at[:, channels] for x in here.keys))
    return keys, here.gates.at[:, :, channels]


def _scores(plan: Plan, here: ScoresChannelScratch, levels: Ref) -> list[Array]:
    """P without its scale, and A if anything erases."""
    row, column = wg.indices(CHUNK, CHUNK)
    p = jnp.where(row == column, wg.product((here.keys.q, wg.turned(here.keys.k))), 0.0)

    def of_level(level: Array, now: list[Array]) -> list[Array]:
        taken, size = here.taken.arrived(level), lax.shift_left(1, level)
        here.taken.bring(levels, level + 1)

        def run(*sums: wg.Sum) -> list[Array]:
            """A block's exponents are summed while those of the one before it are at work."""
            exponents, found = sums[:2], sums[2:]

            def start(block: int) -> None:
                _, gates = _block(here, block)
                if block > 1:
                    exponents[block % 2].start(wg.zeros(CHUNK, BLOCK))
                exponents[block % 2].add(*((taken, part) for part in wg.parts(gates)))

            start(0)
            for block in range(plan.key_blocks):
                more = block + 1 < plan.key_blocks
                if more:
                    start(block + 1)
                factor, (keys, _) = jnp.exp2(exponents[block % 2].value(under_way=2 * more)), _block(here, block)
                right = here.tiles.at[block % 2]
                left = [wg.read(keys.q) * factor]
                k = (wg.read(keys.k) * factor).astype(jnp.bfloat16)
                right[...] = k
                if plan.erases:
                    left.append(wg.read(keys.erase) * factor if plan.erase_heads else k)
                plgpu.commit_smem()
                for total, x in zip(found, left, strict=True):
                    total.add((x.astype(jnp.bfloat16), wg.turned(right)))
            return [total.value() for total in found]

        found = wg.with_sums(run, *((CHUNK, BLOCK),) * 2, *((CHUNK, CHUNK),) * len(now))
        return [jnp.where(meets(size), new, old) for new, old in zip(found, now, strict=True)]

    nothing = [wg.zeros(CHUNK, CHUNK)] if plan.erases else []
    return over_levels(of_level, [p, *nothing])


def _decay_keys(
    plan: Plan, here: ScoresChannelScratch, done: Prepared, batch: Array, head: Array, chunk: Array
) -> None:
    """Writes the keys as the state meets them, and the decay of the whole chunk."""
    row, _ = wg.indices(CHUNK, BLOCK)
    to_end, from_start = here.taken.arrived(END), here.taken.arrived(START)

    def of_block(block: Array, _: None) -> None:
        channels = pl.ds(block * BLOCK, BLOCK)
        now = (batch, pl.ds(chunk * CHUNK, CHUNK), head, channels)
        keys, gates = _block(here, block)
        wg.stored()
        wg.put(here.tiles.at[0], wg.read(keys.k) * factors(gates, to_end))
        wg.store((here.tiles.at[0], done.keys_out.at[now]))
        factor = factors(gates, from_start)
        here.whole[...] = jnp.sum(jnp.where(row == CHUNK - 1, factor, 0.0), axis=0)
        wg.put(here.tiles.at[1], wg.read(keys.q) * (factor * plan.scale))
        copies = [(here.tiles.at[1], done.query_in.at[now]), (here.whole, done.whole.at[batch, head, chunk, channels])]
        if plan.erases:
            wg.stored()
            wg.put(here.tiles.at[0], wg.read(keys.erase if plan.erase_heads else keys.k) * factor)
            copies.append((here.tiles.at[0], done.erase_in.at[now]))
        wg.store(*copies)

    lax.fori_loop(0, plan.key_blocks, of_block, None)
    wg.stored()
