"""What the cotangents of keys, scores and scalars share with and without a gate per channel.

A program handles one chunk of one head and a block of the key's channels. First it takes from the values what it wants of
them, five products of 64 x 64, while the keys arrive; then the values leave shared memory and the scores have it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu.arrays import Prepared, Tokens, keys_of, of_chunks, of_tokens
from pallas_kernels.gpu.plan import BLOCK, CHUNK, Plan
from pallas_kernels.gpu.warpgroup import (
    Ref,
    kernel,
    load,
    loaded,
    place,
    products,
    put,
    read,
    shared,
    store,
    stored,
    turned,
    vectors,
)

DIRECT, COLUMNS, WRITES, PAIRS, READS = range(5)  # the last two with a gate per head


class Inputs(NamedTuple):
    tokens: Tokens
    done: Prepared
    y: Ref  # Y, bfloat16 [batch, time, heads, value]
    d_o: Ref
    d_b: Ref
    states: Ref  # before every chunk, bfloat16 [batch, heads, chunks, key, value]
    d_states: Ref  # the cotangents of those after it, likewise


class Gradients(NamedTuple):
    """Every value head has its own, also of a key that it shares."""

    d_q: Ref  # bfloat16 [batch, time, heads, key]
    d_k: Ref
    d_erase: Ref  # None where k erases: its cotangent then holds both
    d_gates: Ref  # a gate per channel, but for the whole: float32 [batch, time, heads, key]
    # READS and WRITES are to be summed over the blocks of the key
    sums: Ref  # float32 [batch, heads, chunks, key blocks, kinds, 64]
    whole: Ref  # the row sums of S * dS', float32 [batch, heads, chunks, key]


class Products(NamedTuple):
    """What the values give, `[64, 64]`; None for what nothing erases."""

    d_p: Any  # dO Y^T
    d_a: Any  # dB Y^T
    d_q: Any  # dO S^T
    d_erase: Any  # dB S^T
    d_k: Any  # Y dS'^T


class Cotangents(NamedTuple):
    q: Array
    k: Array
    erase: Array | None
    gates: Ref  # in shared memory


class Program(NamedTuple):
    """Where a program is, and its shared memory for what is not of the values."""

    at: Any  # batch, head, chunk and block of the key
    q: Ref  # [64, 64]
    k: Ref
    erase: Ref
    p: Ref
    a: Ref
    gates: Ref  # [2, 64, 64]
    scalars: Ref  # [kinds, 64]
    sums: Ref  # [kinds, 64]
    whole: Ref  # [64]
    full: Ref

    @property
    def erase_key(self) -> Ref:
        return self.k if self.erase is None else self.erase


class Values(NamedTuple):
    y: Ref  # [64, value]
    d_o: Ref
    d_b: Ref
    state: Ref
    d_state: Ref
    full: Ref


def launch(
    plan: Plan,
    inputs: Inputs,
    scores: Callable[[Program, Products, Any], Cotangents],
    scratch: Any,
) -> Gradients:
    """Runs `scores(program, products, scratch)`, which gives the cotangents of q, k, erase key and gates, everywhere."""
    kinds = 5 if plan.gate == "head" else 3

    def body(inputs: Inputs, results: Gradients, here: Program) -> None:
        here = here._replace(at=place("batch", "head", "chunk", "block"))
        _fetch(plan, inputs, here)
        products = _of_values(plan, inputs, here)
        loaded(here.full)

        def rest(scratch: Any) -> None:
            _leave(results, here, scores(here, products, scratch))

        pl.run_scoped(rest, scratch, collective_axes="warpgroup")

    tile = shared(CHUNK, BLOCK)
    copies = 4 + plan.erases + (plan.erase_heads > 0) + 2 * (plan.gate == "channel")
    program = Program(
        at=None,
        q=tile,
        k=tile,
        erase=tile if plan.erase_heads else None,
        p=tile,
        a=tile if plan.erases else None,
        gates=shared(2, CHUNK, BLOCK) if plan.gate == "channel" else None,
        scalars=vectors(*inputs.tokens.scalars.shape[-2:]),
        sums=vectors(kinds, CHUNK),
        whole=vectors(BLOCK),
        full=plgpu.Barrier(num_arrivals=copies),
    )
    results = Gradients(
        d_q=of_tokens(plan, plan.key),
        d_k=of_tokens(plan, plan.key),
        d_erase=of_tokens(plan, plan.key) if plan.erase_heads else None,
        d_gates=of_tokens(plan, plan.key, jnp.float32) if plan.gate == "channel" else None,
        sums=of_chunks(plan, plan.key_blocks, kinds, CHUNK, dtype=jnp.float32),
        whole=of_chunks(plan, plan.key, dtype=jnp.float32),
    )
    grid = {"block": plan.key_blocks, "chunk": plan.chunks, "head": plan.heads, "batch": plan.batch}
    return kernel(body, inputs, results, program, grid, "delta_rule_gradients")


def _fetch(plan: Plan, inputs: Inputs, here: Program) -> None:
    batch, head, chunk, block = here.at
    now, channels = pl.ds(chunk * CHUNK, CHUNK), pl.ds(block * BLOCK, BLOCK)
    given = keys_of(plan, inputs.tokens, batch, head)
    copies = [
        (given.q.at[now, channels], here.q),
        (given.k.at[now, channels], here.k),
        (inputs.done.p.at[batch, head, chunk], here.p),
        (inputs.tokens.scalars.at[batch, head, chunk], here.scalars),
    ]
    if plan.erase_heads:
        copies.append((given.erase.at[now, channels], here.erase))
    if plan.erases:
        copies.append((inputs.done.a.at[batch, head, chunk], here.a))
    if plan.gate == "channel":
        copies += [(inputs.tokens.gates.at[part, batch, now, head, channels], here.gates.at[part]) for part in (0, 1)]
    load(here.full, *copies)


def _of_values(plan: Plan, inputs: Inputs, here: Program) -> Products:
    """Also writes the sums that need nothing else."""
    batch, head, chunk, block = here.at
    now = (batch, pl.ds(chunk * CHUNK, CHUNK), head)
    rows = (batch, head, chunk, pl.ds(block * BLOCK, BLOCK))

    def run(values: Values) -> Products:
        sources = [x.at[now] for x in (inputs.y, inputs.d_o, inputs.d_b)]
        sources += [x.at[rows] for x in (inputs.states, inputs.d_states)]
        load(values.full, *zip(sources, values[:5], strict=True))
        loaded(values.full)
        here.sums[DIRECT] = jnp.sum(read(values.y) * read(values.d_b), axis=1)
        here.whole[...] = jnp.sum(read(values.state) * read(values.d_state), axis=1)
        pairs = Products(
            d_p=(values.d_o, turned(values.y)),
            d_a=(values.d_b, turned(values.y)),
            d_q=(values.d_o, turned(values.state)),
            d_erase=(values.d_b, turned(values.state)),
            d_k=(values.y, turned(values.d_state)),
        )
        wanted = [n for n, x in enumerate(pairs) if plan.erases or x[0] is not values.d_b]
        found = dict(zip(wanted, products(*([pairs[n]] for n in wanted)), strict=True))
        return Products(*(found.get(n) for n in range(len(pairs))))

    tile = shared(CHUNK, plan.value)
    values = Values(*(tile,) * 5, full=plgpu.Barrier(num_arrivals=5))
    return pl.run_scoped(run, values, collective_axes="warpgroup")


def _leave(results: Gradients, here: Program, d_keys: Cotangents) -> None:
    """Writes the results, which take the places of what was fetched."""
    d_k = d_keys.k
    if d_keys.erase is not None and here.erase is None:
        d_k = d_k + d_keys.erase
    batch, head, chunk, block = here.at
    channels = pl.ds(block * BLOCK, BLOCK)
    now = (batch, pl.ds(chunk * CHUNK, CHUNK), head, channels)
    put(here.q, d_keys.q)
    put(here.k, d_k)
    copies = [
        (here.q, results.d_q.at[now]),
        (here.k, results.d_k.at[now]),
        (here.sums, results.sums.at[batch, head, chunk, block]),
        (here.whole, results.whole.at[batch, head, chunk, channels]),
    ]
    if d_keys.erase is not None and here.erase is not None:
        put(here.erase, d_keys.erase)
        copies.append((here.erase, results.d_erase.at[now]))
    if d_keys.gates is not None:
        copies.append((d_keys.gates, results.d_gates.at[now]))
    store(*copies)
    stored(and_written=True)
