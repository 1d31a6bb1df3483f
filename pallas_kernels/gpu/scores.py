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

from pallas_kernels.gpu import products as mm
from pallas_kernels.gpu import warpgroup as wg
from pallas_kernels.gpu.arrays import BETA, GATE, Prepared, channels_of, of_chunks, places_of
from pallas_kernels.gpu.plan import CHUNK, Plan
from pallas_kernels.gpu.warpgroup import Ref

DIRECT, COLUMNS, PAIRS = range(3)  # the last with a gate per head
DIAGONAL = PAIRS  # with a gate per channel


class ScoresInputs(NamedTuple):
    done: Prepared
    scalars: Ref  # of `Tokens`
    y: Any  # of `Inputs` of `pallas_kernels.gpu.cotangents`
    d_b: Any
    d_o: Any
    masks: Ref  # ones where the row is after the column, and where it is not: [2, 64, 64]


class Scores(NamedTuple):
    d_p: Any  # dP in the plan's `split`, bfloat16 [batch, heads, chunks, 64, 64] each, rows and columns exchanged
    d_a: Any  # dA, likewise; None where nothing erases
    sums: Ref  # float32 [batch, heads, chunks, kinds, 64]


class Values(NamedTuple):
    """So many channels, `[64, plan.step]`, in parts."""

    y: Any
    d_b: Any
    d_o: Any


class ScoresScratch(NamedTuple):
    p: Any  # in parts, [64, 64]
    a: Any
    masks: Ref  # [2, 64, 64]
    scalars: Ref  # [kinds, 64]
    sums: Ref  # [kinds, 64]
    full: Ref


def cotangents_of_scores(plan: Plan, done: Prepared, scalars: Array, y: Any, d_b: Any, d_o: Any) -> Scores:
    gated = plan.gate == "head"
    kinds = 2 if plan.gate == "none" else 3

    def body(inputs: ScoresInputs, results: Scores, here: ScoresScratch) -> None:
        batch, head, chunk = wg.place("batch", "head", "chunk")
        at = batch, head, chunk
        copies = [(places_of(inputs.done.p, at), here.p), (inputs.scalars.at[at], here.scalars)]
        if plan.erases:
            copies.append((places_of(inputs.done.a, at), here.a))
        if gated:
            copies += [(inputs.masks.at[n], here.masks.at[n]) for n in (0, 1)]
        wg.load(here.full, *copies)
        d_p, d_a = _of_values(plan, inputs, *at)
        wg.loaded(here.full)

        def rest(scratch: Ref) -> None:
            of_p, of_a = _leave(plan, here, d_p, d_a, scratch)
            copies = [(of_p, places_of(results.d_p, at)), (here.sums, results.sums.at[at])]
            if plan.erases:
                copies.append((of_a, places_of(results.d_a, at)))
            wg.store(*copies)
            wg.stored(and_written=True)

        scratch = tuple((tile,) * max(2 if gated else 1, plan.split) for _ in range(1 + plan.erases))
        pl.run_scoped(rest, scratch, collective_axes="warpgroup")

    tile = wg.shared(CHUNK, CHUNK)
    before = np.tri(CHUNK, k=-1)
    return wg.kernel(
        plan.machine,
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
            d_p=(of_chunks(plan, CHUNK, CHUNK),) * plan.split,
            d_a=(of_chunks(plan, CHUNK, CHUNK),) * plan.split if plan.erases else None,
            sums=of_chunks(plan, kinds, CHUNK, dtype=jnp.float32),
        ),
        ScoresScratch(
            p=(tile,) * plan.split,
            a=(tile,) * plan.parts if plan.erases else None,
            masks=wg.shared(2, CHUNK, CHUNK) if gated else None,
            scalars=wg.vectors(plan.kinds, CHUNK),
            sums=wg.vectors(kinds, CHUNK),
            full=plgpu.Barrier(num_arrivals=1 + plan.split + plan.parts * plan.erases + 2 * gated),
        ),
        {"chunk": plan.chunks, "head": plan.heads, "batch": plan.batch},
        "delta_rule_scores",
    )


def over_values[T](
    plan: Plan,
    sources: Callable[[Array], Any],
    sums: Callable[[Any], Sequence[mm.Pairs]],
    count: int,
    read: Callable[[Any, T], T],
    carry: T,
) -> tuple[list[Array], T]:
    """So many sums of products over the channels of the values, and `read` over them, while the next ones arrive.

    `sources(step)` is a tree of what a step wants, `[64, plan.step]` each; `sums` and `read` get it in shared memory.
    """
    steps, slots = plan.value // plan.step, plan.machine.places  # with two, one arrives while the other is multiplied
    shapes = jax.tree.map(lambda _: wg.shared(slots, CHUNK, plan.step, swizzle=2 * plan.step), sources(jnp.int32(0)))

    def run(values: Any, full: Ref) -> tuple[list[Array], T]:
        def bring(step: Array) -> None:
            slot = lax.rem(step, slots)
            here = jax.tree.map(lambda ref: ref.at[slot], values)
            wg.load(full.at[slot], *zip(jax.tree.leaves(sources(step)), jax.tree.leaves(here), strict=True))

        def arrive(step: Array, carry: T) -> tuple[Sequence[mm.Pairs], T]:
            slot = lax.rem(step, slots)
            here = jax.tree.map(lambda ref: ref.at[slot], values)
            if slots > 1:
                wg.loaded(full.at[slot], then=lambda: pl.when(step + 1 < steps)(lambda: bring(step + 1)))
            else:
                bring(step)
                wg.loaded(full.at[slot])
            return sums(here), read(here, carry)

        if slots > 1:
            bring(jnp.int32(0))
        return mm.products_over(steps, arrive, carry, *((CHUNK, CHUNK),) * count)

    full = plgpu.Barrier(num_arrivals=len(jax.tree.leaves(shapes)), num_barriers=slots)
    return pl.run_scoped(run, shapes, full, collective_axes="warpgroup")


def _of_values(plan: Plan, inputs: ScoresInputs, batch: Array, head: Array, chunk: Array) -> list[Array]:
    """Y dO^T and Y dB^T."""

    def sources(step: Array) -> Values:
        now = (batch, pl.ds(chunk * CHUNK, CHUNK), channels_of(head, plan.value, step, plan.step))
        return Values(*jax.tree.map(lambda x: x.at[now], (inputs.y, inputs.d_b, inputs.d_o)))

    def sums(here: Values) -> list[mm.Pairs]:
        return [[(here.y, wg.turned(x))] for x in (here.d_o, here.d_b)]

    return over_values(plan, sources, sums, 2, lambda _, carry: carry, ())[0]


def _leave(plan: Plan, here: ScoresScratch, d_p: Array, d_a: Array, scratch: Any) -> tuple[Any, Any]:
    """Writes the sums and says where the cotangents are; of a pair of tokens the later is the column."""
    row, column = wg.indices(CHUNK, CHUNK)
    here.sums[DIRECT] = jnp.sum(jnp.where(row == column, d_a, 0.0), axis=1)
    terms = d_p * wg.read(wg.turned(here.p))
    if plan.erases:
        terms = terms - d_a * wg.read(wg.turned(here.a))
    here.sums[COLUMNS] = jnp.sum(terms, axis=1)
    beta = wg.each_row(wg.along_rows(here.scalars.at[BETA]), CHUNK)
    d_p = d_p * (beta * plan.scale)
    d_a = d_a * (0.0 - beta)
    if plan.gate == "channel":
        d_p, d_a = (jnp.where(row <= column, x, 0.0) for x in (d_p, d_a))
        here.sums[DIAGONAL] = jnp.sum(jnp.where(row == column, d_p, 0.0), axis=1)
        for n, (x, tile) in enumerate([(d_p, here.p), (d_a, here.a)][: 1 + plan.erases]):
            wg.put(tile, x)
            turned = wg.read(wg.turned(tile))
            wg.put(scratch[n][: plan.split], jnp.where(row == column, 0.0, x + turned))
        return scratch[0], scratch[-1]
    if plan.gate == "head":
        wg.put(scratch[0], terms * beta)
        mm.commit()
        before, until = here.masks.at[0], here.masks.at[1]
        gates = jnp.where(column > row, wg.each_column(wg.along_columns(here.scalars.at[GATE]), CHUNK), 0.0)

        def run(total: mm.Sum, crossing: mm.Sum) -> tuple[Array, Array]:
            total.add((wg.split_of(gates, 2), until))
            crossing.add((before, scratch[0]))
            return total.value(under_way=2), crossing.value()

        total, crossing = mm.with_sums(run, (CHUNK, CHUNK), (CHUNK, CHUNK))
        here.sums[PAIRS] = jnp.sum(jnp.where(row <= column, crossing, 0.0), axis=1)
        decay = jnp.exp2(jnp.where(row <= column, total, -1e30))
    else:
        decay = jnp.where(row <= column, 1.0, 0.0)
    of_p, of_a = here.p[: plan.split], here.a[: plan.split] if plan.erases else None
    wg.put(of_p, d_p * decay)
    if plan.erases:
        wg.put(of_a, jnp.where(row < column, d_a * decay, 0.0))
    return of_p, of_a
