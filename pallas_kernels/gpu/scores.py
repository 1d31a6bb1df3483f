"""Cotangents of the scores of a chunk, for all chunks at once, and the sums that need nothing else.

With the symbols of `pallas_kernels.gpu.reverse`, of a chunk and head:

    dA = -dB Y^T diag(b)   (i > j)                       dP = scale dO Y^T diag(b)   (i >= j)

Here they are turned, with a gate per head or none decayed, and with a gate per channel made symmetric, since each level
there takes a pair of tokens both ways. The diagonal of dB Y^T gives the cotangent of beta where beta is not zero.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu import warpgroup as wg
from pallas_kernels.gpu.arrays import BETA, GATE, Prepared, of_chunks
from pallas_kernels.gpu.plan import CHUNK, Plan
from pallas_kernels.gpu.warpgroup import Ref

DIRECT, COLUMNS, PAIRS = range(3)  # the last with a gate per head
DIAGONAL = PAIRS  # with a gate per channel
STEP = 32  # channels of the values at a time
SLOTS = 2  # of which one arrives while the other is multiplied


class ScoresInputs(NamedTuple):
    done: Prepared
    scalars: Ref  # of `Tokens`
    y: Any  # of `Inputs` of `pallas_kernels.gpu.cotangents`
    d_b: Any
    d_o: Ref
    masks: Ref  # ones where the row is after the column, and where it is not: [2, 64, 64]


class Scores(NamedTuple):
    d_p: Ref  # dP, bfloat16 [batch, heads, chunks, 64, 64], rows and columns exchanged
    d_a: Ref  # dA, likewise; None where nothing erases
    sums: Ref  # float32 [batch, heads, chunks, kinds, 64]


class Values(NamedTuple):
    """So many channels, `[64, STEP]`; the first two in parts."""

    y: Any
    d_b: Any
    d_o: Ref


class ScoresScratch(NamedTuple):
    p: Any  # in parts, [64, 64]
    a: Any
    masks: Ref  # [2, 64, 64]
    scalars: Ref  # [kinds, 64]
    sums: Ref  # [kinds, 64]
    full: Ref


def cotangents_of_scores(plan: Plan, done: Prepared, scalars: Array, y: Any, d_b: Any, d_o: Array) -> Scores:
    gated = plan.gate == "head"
    kinds = 2 if plan.gate == "none" else 3

    def body(inputs: ScoresInputs, results: Scores, here: ScoresScratch) -> None:
        batch, head, chunk = wg.place("batch", "head", "chunk")
        at = batch, head, chunk
        copies = [(x.at[at], y) for x, y in zip(inputs.done.p, here.p, strict=True)]
        copies.append((inputs.scalars.at[at], here.scalars))
        if plan.erases:
            copies += [(x.at[at], y) for x, y in zip(inputs.done.a, here.a, strict=True)]
        if gated:
            copies += [(inputs.masks.at[n], here.masks.at[n]) for n in (0, 1)]
        wg.load(here.full, *copies)
        d_p, d_a = _of_values(plan, inputs, *at)
        wg.loaded(here.full)

        def rest(scratch: Ref) -> None:
            of_p, of_a = _leave(plan, here, d_p, d_a, scratch)
            copies = [(of_p, results.d_p.at[at]), (here.sums, results.sums.at[at])]
            if plan.erases:
                copies.append((of_a, results.d_a.at[at]))
            wg.store(*copies)
            wg.stored(and_written=True)

        pl.run_scoped(rest, wg.shared(2, CHUNK, CHUNK), collective_axes="warpgroup")

    tile = wg.shared(CHUNK, CHUNK)
    before = np.tri(CHUNK, k=-1)
    return wg.kernel(
        body,
        ScoresInputs(
            done=Prepared(p=done.p, x=None, a=done.a, query_in=None, erase_in=None, keys_out=None, whole=None),
            scalars=scalars,
            y=y,
            d_b=d_b,
            d_o=d_o,
            masks=jnp.asarray(np.stack([before, 1 - before]), jnp.bfloat16) if gated else None,
        ),
        Scores(
            d_p=of_chunks(plan, CHUNK, CHUNK),
            d_a=of_chunks(plan, CHUNK, CHUNK) if plan.erases else None,
            sums=of_chunks(plan, kinds, CHUNK, dtype=jnp.float32),
        ),
        ScoresScratch(
            p=(tile,) * plan.parts,
            a=(tile,) * plan.parts if plan.erases else None,
            masks=wg.shared(2, CHUNK, CHUNK) if gated else None,
            scalars=wg.vectors(*scalars.shape[-2:]),
            sums=wg.vectors(kinds, CHUNK),
            full=plgpu.Barrier(num_arrivals=1 + plan.parts * (1 + plan.erases) + 2 * gated),
        ),
        {"chunk": plan.chunks, "head": plan.heads, "batch": plan.batch},
        "delta_rule_scores",
    )


def over_values[T](
    plan: Plan,
    sources: Callable[[Array], Any],
    sums: Callable[[Any], Sequence[wg.Pairs]],
    count: int,
    read: Callable[[Any, T], T],
    carry: T,
) -> tuple[list[Array], T]:
    """So many sums of products over the channels of the values, and `read` over them, while the next ones arrive.

    `sources(step)` is a tree of what a step wants, `[64, STEP]` each; `sums` and `read` get it in shared memory.
    """
    steps = plan.value // STEP
    shapes = jax.tree.map(lambda _: wg.shared(SLOTS, CHUNK, STEP, swizzle=2 * STEP), sources(jnp.int32(0)))

    def run(values: Any, full: Ref) -> tuple[list[Array], T]:
        def bring(step: Array) -> None:
            slot = lax.rem(step, SLOTS)
            here = jax.tree.map(lambda ref: ref.at[slot], values)
            wg.load(full.at[slot], *zip(jax.tree.leaves(sources(step)), jax.tree.leaves(here), strict=True))

        def arrive(step: Array, carry: T) -> tuple[Sequence[wg.Pairs], T]:
            pl.when(step + 1 < steps)(lambda: bring(step + 1))
            slot = lax.rem(step, SLOTS)
            here = jax.tree.map(lambda ref: ref.at[slot], values)
            wg.loaded(full.at[slot])
            return sums(here), read(here, carry)

        bring(jnp.int32(0))
        return wg.products_over(steps, arrive, carry, *((CHUNK, CHUNK),) * count)

    full = plgpu.Barrier(num_arrivals=len(jax.tree.leaves(shapes)), num_barriers=SLOTS)
    return pl.run_scoped(run, shapes, full, collective_axes="warpgroup")


def _of_values(plan: Plan, inputs: ScoresInputs, batch: Array, head: Array, chunk: Array) -> list[Array]:
    """Y dO^T and Y dB^T."""

    def sources(step: Array) -> Values:
        now = (batch, pl.ds(chunk * CHUNK, CHUNK), head, pl.ds(step * STEP, STEP))
        return Values(*jax.tree.map(lambda x: x.at[now], (inputs.y, inputs.d_b, inputs.d_o)))

    def sums(here: Values) -> list[wg.Pairs]:
        return [wg.split_pairs(here.y, x, turn_b=True) for x in ((here.d_o,), here.d_b)]

    return over_values(plan, sources, sums, 2, lambda _, carry: carry, ())[0]


def _leave(plan: Plan, here: ScoresScratch, d_p: Array, d_a: Array, scratch: Ref) -> tuple[Ref, Ref]:
    """Writes the sums and says where the cotangents are; of a pair of tokens the later is the column."""
    row, column = wg.indices(CHUNK, CHUNK)
    here.sums[DIRECT] = jnp.sum(jnp.where(row == column, d_a, 0.0), axis=1)
    terms = d_p * wg.read_split(tuple(map(wg.turned, here.p)))
    if plan.erases:
        terms = terms - d_a * wg.read_split(tuple(map(wg.turned, here.a)))
    here.sums[COLUMNS] = jnp.sum(terms, axis=1)
    beta = wg.each_row(wg.along_rows(here.scalars.at[BETA]), CHUNK)
    d_p = d_p * (beta * plan.scale)
    d_a = d_a * (0.0 - beta)
    if plan.gate == "channel":
        d_p, d_a = (jnp.where(row <= column, x, 0.0) for x in (d_p, d_a))
        here.sums[DIAGONAL] = jnp.sum(jnp.where(row == column, d_p, 0.0), axis=1)
        for n, (x, tile) in enumerate([(d_p, here.p), (d_a, here.a)][: 1 + plan.erases]):
            wg.put(tile[0], x)
            turned = wg.read(wg.turned(tile[0]))
            wg.put(scratch.at[n], jnp.where(row == column, 0.0, x + turned))
        return scratch.at[0], scratch.at[1]
    if plan.gate == "head":
        wg.put_split(scratch, terms * beta)
        plgpu.commit_smem()
        before, until = here.masks.at[0], here.masks.at[1]
        gates = jnp.where(column > row, wg.each_column(wg.along_columns(here.scalars.at[GATE]), CHUNK), 0.0)

        def run(total: wg.Sum, crossing: wg.Sum) -> tuple[Array, Array]:
            total.add(*((part, until) for part in wg.split_of(gates, 2)))
            crossing.add(*((before, part) for part in wg.parts(scratch)))
            return total.value(under_way=2), crossing.value()

        total, crossing = wg.with_sums(run, (CHUNK, CHUNK), (CHUNK, CHUNK))
        here.sums[PAIRS] = jnp.sum(jnp.where(row <= column, crossing, 0.0), axis=1)
        decay = jnp.exp2(jnp.where(row <= column, total, -1e30))
    else:
        decay = jnp.where(row <= column, 1.0, 0.0)
    wg.put(here.p[0], d_p * decay)
    if plan.erases:
        wg.put(here.a[0], jnp.where(row < column, d_a * decay, 0.0))
    return here.p[0], here.a[0] if plan.erases else None
