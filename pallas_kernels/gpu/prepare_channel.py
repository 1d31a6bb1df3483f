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

from pallas_kernels.gpu import products as mm
from pallas_kernels.gpu import warpgroup as wg
from pallas_kernels.gpu.arrays import Operands, Prepared, Tokens, channels_of, keys_of, places_of, prepared_shapes
from pallas_kernels.gpu.inverse import finish
from pallas_kernels.gpu.levels import END, START, Taken, factors, meets, over_levels, put_gates, taken_scratch, takes
from pallas_kernels.gpu.plan import BLOCK, CHUNK, Plan
from pallas_kernels.gpu.warpgroup import Ref


class PrepareChannelScratch(NamedTuple):
    scalars: Ref  # [kinds, 64]
    scalars_full: Ref


class ScoresChannelScratch(NamedTuple):
    """What the inverse has no use for, which then has its place."""

    keys: Operands  # of a group of blocks of channels, [64, blocks * 64]
    gates: Ref  # [2, 64, blocks * 64]
    tiles: Any  # decayed keys of a block of channels, two times in the plan's `split`: [64, 64] each
    taken: Taken
    whole: Ref  # exp(G_64), [64]
    full: Ref


def prepare_channel(plan: Plan, tokens: Tokens, *, for_backward: bool) -> Prepared:
    def body(inputs: tuple[Tokens, Ref], done: Prepared, here: PrepareChannelScratch) -> None:
        tokens, levels = inputs
        batch, head, chunk = wg.place("batch", "head", "chunk")
        wg.load(here.scalars_full, (tokens.scalars.at[batch, head, chunk], here.scalars))

        def of_all(scratch: ScoresChannelScratch) -> list[Array]:
            def of_group(group: Array, scores: list[Array]) -> list[Array]:
                at = Group(batch, head, chunk, group, blocks)
                scratch.taken.bring(levels, 0)
                _fetch(plan, tokens, scratch, at)
                scores = _scores(plan, scratch, levels, blocks, scores)
                scratch.taken.bring(levels, START)
                _decay_keys(plan, scratch, done, at)
                return scores

            nothing = [wg.zeros(CHUNK, CHUNK) for _ in range(1 + plan.erases)]
            groups = plan.key_blocks // blocks
            return lax.fori_loop(0, groups, of_group, nothing) if groups > 1 else of_group(jnp.int32(0), nothing)

        def wide(*shape: int) -> Any:
            return wg.shared(*shape, CHUNK, blocks * BLOCK)

        def keys() -> Any:
            return (wide(),) * plan.split

        own, blocks = plan.erase_heads > 0, _group(plan)
        scores = pl.run_scoped(
            of_all,
            ScoresChannelScratch(
                keys=Operands(keys(), keys(), keys() if own else None),
                gates=wide(2),
                tiles=((wg.shared(CHUNK, BLOCK),) * plan.split,) * 2,
                taken=taken_scratch(),
                whole=wg.vectors(BLOCK),
                full=plgpu.Barrier(num_arrivals=plan.split * (2 + own)),
            ),
            collective_axes="warpgroup",
        )

        def leave(*tiles: Ref) -> None:
            p, *a = scores
            copies = []
            results = [(p * plan.scale, done.p), *((x, done.a) for x in a)]
            for (x, result), tile in zip(results, tiles, strict=False):
                wg.put(tile, x)
                copies.append((tile, places_of(result, (batch, head, chunk))))
            wg.store(*copies)
            wg.loaded(here.scalars_full)
            finish(a[0] if a else None, here.scalars, lambda part: done.x.at[batch, head, chunk, part])

        tiles = ((wg.shared(CHUNK, CHUNK),) * plan.split,) * (1 + (done.a is not None))
        pl.run_scoped(leave, *tiles, collective_axes="warpgroup")

    return wg.kernel(
        plan.machine,
        body,
        (tokens._replace(v=None), takes()),
        prepared_shapes(plan, for_backward=for_backward),
        PrepareChannelScratch(scalars=wg.vectors(plan.kinds, CHUNK), scalars_full=plgpu.Barrier()),
        {"chunk": plan.chunks, "head": plan.heads, "batch": plan.batch},
        "delta_rule_prepare",
    )


class Group(NamedTuple):
    """Where a program is: a group of blocks of a key's channels, which have their place in shared memory together."""

    batch: Array
    head: Array
    chunk: Array
    group: Array
    blocks: int

    def channels(self, plan: Plan, block: int | Array) -> tuple[Any, ...]:
        """Where one of its blocks lies."""
        channels = channels_of(self.head, plan.key, self.group * self.blocks + block, BLOCK)
        return self.batch, pl.ds(self.chunk * CHUNK, CHUNK), channels


def _group(plan: Plan) -> int:
    """So many blocks that two programs fit a multiprocessor, one at least."""
    room = plan.machine.shared_bytes // 2 // (2 * CHUNK * BLOCK) - 2 - 2 * plan.split
    most = max(1, room // (2 + plan.split * (2 + (plan.erase_heads > 0))))
    return max(n for n in (1, 2, 4) if plan.key_blocks % n == 0 and n <= most)


def _fetch(plan: Plan, tokens: Tokens, here: ScoresChannelScratch, at: Group) -> None:
    given = keys_of(plan, tokens, at.batch, at.head, pl.ds(at.chunk * CHUNK, CHUNK), at.group, at.blocks * BLOCK)
    copies = [(given.q, here.keys.q), (given.k, here.keys.k)]
    if plan.erase_heads:
        copies.append((given.erase, here.keys.erase))
    wg.load(here.full, *copies)
    for block in range(at.blocks):
        put_gates(_block(here, block)[1], tokens.gates.at[at.channels(plan, block)])
    mm.commit()
    wg.loaded(here.full)


def _block(here: ScoresChannelScratch, block: int | Array) -> tuple[Operands, Ref]:
    """The keys and the gates of a block of channels."""
    channels = pl.ds(block * BLOCK, BLOCK)
    keys: Operands = places_of(here.keys, (slice(None), channels))
    return keys, here.gates.at[:, :, channels]


def _scores(plan: Plan, here: ScoresChannelScratch, levels: Ref, blocks: int, scores: list[Array]) -> list[Array]:
    """P without its scale, and A if anything erases, with what the groups before have given."""
    row, column = wg.indices(CHUNK, CHUNK)
    p = scores[0] + jnp.where(row == column, mm.product((here.keys.q, wg.turned(here.keys.k))), 0.0)

    def of_level(level: Array, now: list[Array]) -> list[Array]:
        taken, size = here.taken.arrived(level), lax.shift_left(1, level)
        here.taken.bring(levels, level + 1)

        def run(*sums: mm.Sum) -> list[Array]:
            """A block's exponents are summed while those of the one before it are at work."""
            exponents, found = sums[:2], sums[2:]

            def start(block: int) -> None:
                _, gates = _block(here, block)
                if block > 1:
                    exponents[block % 2].start(wg.zeros(CHUNK, BLOCK))
                exponents[block % 2].add((taken, wg.along_first(gates)))

            start(0)
            for block in range(blocks):
                more = block + 1 < blocks
                if more:
                    start(block + 1)
                factor, (keys, _) = jnp.exp2(exponents[block % 2].value(under_way=2 * more)), _block(here, block)
                right = here.tiles[block % 2]
                left = [wg.read(keys.q) * factor]
                k = wg.read(keys.k) * factor
                wg.put(right, k)
                if plan.erases:
                    left.append(wg.read(keys.erase) * factor if plan.erase_heads else k)
                mm.commit()
                for total, x in zip(found, left, strict=True):
                    total.add((wg.split_of(x, plan.split), wg.turned(right)))
            return [total.value() for total in found]

        found = mm.with_sums(run, *((CHUNK, BLOCK),) * 2, *((CHUNK, CHUNK),) * len(now))
        if blocks < plan.key_blocks:
            return [old + jnp.where(meets(size), new, 0.0) for new, old in zip(found, now, strict=True)]
        return [jnp.where(meets(size), new, old) for new, old in zip(found, now, strict=True)]

    return over_levels(of_level, [p, *scores[1:]])


def _decay_keys(plan: Plan, here: ScoresChannelScratch, done: Prepared, at: Group) -> None:
    """Writes the keys as the state meets them, and the decay of the whole chunk."""
    row, _ = wg.indices(CHUNK, BLOCK)
    to_end, from_start = here.taken.arrived(END), here.taken.arrived(START)

    def of_block(block: Array, _: None) -> None:
        now = at.channels(plan, block)
        whole = (at.batch, at.head, at.chunk, pl.ds((at.group * at.blocks + block) * BLOCK, BLOCK))
        keys, gates = _block(here, block)
        wg.stored()
        wg.put(here.tiles[0], wg.read(keys.k) * factors(gates, to_end))
        wg.store((here.tiles[0], places_of(done.keys_out, now)))
        factor = factors(gates, from_start)
        here.whole[...] = jnp.sum(jnp.where(row == CHUNK - 1, factor, 0.0), axis=0)
        wg.put(here.tiles[1], wg.read(keys.q) * (factor * plan.scale))
        copies = [(here.tiles[1], places_of(done.query_in, now)), (here.whole, done.whole.at[whole])]
        if plan.erases:
            wg.stored()
            wg.put(here.tiles[0], wg.read(keys.erase if plan.erase_heads else keys.k) * factor)
            copies.append((here.tiles[0], places_of(done.erase_in, now)))
        wg.store(*copies)

    lax.fori_loop(0, at.blocks, of_block, None)
    wg.stored()
