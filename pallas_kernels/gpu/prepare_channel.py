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

from pallas_kernels.gpu.arrays import BETA, Operands, Prepared, Tokens, keys_of, prepared_shapes
from pallas_kernels.gpu.inverse import invert
from pallas_kernels.gpu.levels import factors, meets, over_levels
from pallas_kernels.gpu.plan import BLOCK, CHUNK, Plan
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
    put,
    read,
    shared,
    store,
    stored,
    turned,
    vectors,
    zeros,
)


class Scratch(NamedTuple):
    keys: Operands  # [64, 64]
    decayed: Operands  # [64, 64]
    gates: Ref  # [2, 64, 64]
    takes: Ref  # which gates a factor takes, [64, 64]
    scalars: Ref  # [kinds, 64]
    matrices: tuple[Ref, Ref, Ref]  # [2, 64, 64]
    whole: Ref  # exp(G_64), [64]
    full: Ref
    scalars_full: Ref


def prepare_channel(plan: Plan, tokens: Tokens, *, for_backward: bool) -> Prepared:
    def body(tokens: Tokens, done: Prepared, here: Scratch) -> None:
        batch, head, chunk = place("batch", "head", "chunk")
        one, two, three = here.matrices
        now = (batch, pl.ds(chunk * CHUNK, CHUNK), head)
        load(here.scalars_full, (tokens.scalars.at[batch, head, chunk], here.scalars))

        def channels_of(block: Array, scores: tuple[Array, Array]) -> tuple[Array, Array]:
            stored()
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
            store(*copies)
            return scores

        p, a = lax.fori_loop(0, plan.key_blocks, channels_of, (zeros(CHUNK, CHUNK), zeros(CHUNK, CHUNK)))
        put(three.at[0], p * plan.scale)
        copies = [(three.at[0], done.p[0].at[batch, head, chunk])]
        if done.a is not None:
            put(three.at[1], a)
            copies.append((three.at[1], done.a[0].at[batch, head, chunk]))
        store(*copies)
        loaded(here.scalars_full)
        if plan.erases:
            stored()
            invert(a * each_column(along_columns(here.scalars.at[BETA]), CHUNK), one, two, three)
            store(*((two.at[part], done.x.at[batch, head, chunk, part]) for part in (0, 1)))
        stored(and_written=True)

    tile, matrix = shared(CHUNK, BLOCK), shared(2, CHUNK, CHUNK, swizzle=32)
    return kernel(
        body,
        tokens._replace(v=None),
        prepared_shapes(plan, for_backward=for_backward),
        Scratch(
            keys=Operands(tile, tile, tile if plan.erase_heads else None),
            decayed=Operands(tile, tile, tile if plan.erases else None),
            gates=shared(2, CHUNK, BLOCK),
            takes=tile,
            scalars=vectors(*tokens.scalars.shape[-2:]),
            matrices=(matrix,) * 3,
            whole=vectors(BLOCK),
            full=plgpu.Barrier(num_arrivals=4 + (plan.erase_heads > 0)),
            scalars_full=plgpu.Barrier(),
        ),
        {"chunk": plan.chunks, "head": plan.heads, "batch": plan.batch},
        "delta_rule_prepare",
    )


def _fetch(
    plan: Plan, tokens: Tokens, here: Scratch, batch: Array, head: Array, chunk: Array, channels: pl.Slice
) -> None:
    given, now = keys_of(plan, tokens, batch, head), pl.ds(chunk * CHUNK, CHUNK)
    copies = [(given.q.at[now, channels], here.keys.q), (given.k.at[now, channels], here.keys.k)]
    copies += [(tokens.gates.at[part, batch, now, head, channels], here.gates.at[part]) for part in (0, 1)]
    if plan.erase_heads:
        copies.append((given.erase.at[now, channels], here.keys.erase))
    load(here.full, *copies)
    loaded(here.full)


def _scores(plan: Plan, here: Scratch, matrix: Ref, p: Array, a: Array) -> tuple[Array, Array]:
    """P without its scale, and A, with what these channels give."""
    row, column = indices(CHUNK, CHUNK)
    keys, decayed = here.keys, here.decayed
    p = p + jnp.where(row == column, product((keys.q, turned(keys.k))), 0.0)

    def level(size: Array, now: tuple[Array, Array]) -> tuple[Array, Array]:
        p, a = now
        factor = factors(size, here.gates, matrix)
        put(decayed.q, read(keys.q) * factor)
        put(decayed.k, read(keys.k) * factor)
        erase = decayed.k
        if plan.erase_heads:
            erase = decayed.erase
            put(erase, read(keys.erase) * factor)
        plgpu.commit_smem()
        p = p + jnp.where(meets(size), product((decayed.q, turned(decayed.k))), 0.0)
        if plan.erases:
            a = a + jnp.where(meets(size), product((erase, turned(decayed.k))), 0.0)
        return p, a

    return over_levels(level, (p, a))


def _decay_keys(plan: Plan, here: Scratch, matrix: Ref) -> None:
    """Leaves the keys as the state meets them, and the decay of the whole chunk."""
    start = factors("start", here.gates, matrix)
    put(here.decayed.q, read(here.keys.q) * (start * plan.scale))
    if plan.erases:
        put(here.decayed.erase, read(here.keys.erase if plan.erase_heads else here.keys.k) * start)
    row, _ = indices(CHUNK, BLOCK)
    here.whole[...] = jnp.sum(jnp.where(row == CHUNK - 1, start, 0.0), axis=0)
    plgpu.commit_smem()
    put(here.decayed.k, read(here.keys.k) * factors("end", here.gates, matrix))
