"""What the cotangents of keys, scores and scalars share with and without a gate per channel.

A program handles one chunk of one head and a block of the key's channels. First it takes from the values what it wants of
them, five products of 64 x 64 summed over blocks of their channels, while the keys arrive; then the values leave shared
memory and the scores have it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu import warpgroup as wg
from pallas_kernels.gpu.arrays import Prepared, Tokens, keys_of, of_chunks, of_tokens
from pallas_kernels.gpu.plan import BLOCK, CHUNK, Plan
from pallas_kernels.gpu.warpgroup import Ref

DIRECT, COLUMNS, WRITES, PAIRS, READS = range(5)  # the last two with a gate per head


class Inputs(NamedTuple):
    tokens: Tokens
    done: Prepared
    y: Any  # Y in the plan's `parts`, bfloat16 [batch, time, heads, value] each
    d_b: Any  # dB, likewise
    d_o: Ref
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
    p: Any  # in parts
    a: Any
    gates: Ref  # [2, 64, 64]
    scalars: Ref  # [kinds, 64]
    sums: Ref  # [kinds, 64]
    whole: Ref  # [64]
    full: Ref

    @property
    def erase_key(self) -> Ref:
        return self.k if self.erase is None else self.erase


class Values(NamedTuple):
    """A block of channels, `[64, 64]`; the first two in parts."""

    y: Any
    d_b: Any
    d_o: Ref
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
        here = here._replace(at=wg.place("batch", "head", "chunk", "block"))
        _fetch(plan, inputs, here)
        products = _of_values(plan, inputs, here)
        wg.loaded(here.full)

        def rest(scratch: Any) -> None:
            _leave(results, here, scores(here, products, scratch))

        pl.run_scoped(rest, scratch, collective_axes="warpgroup")

    tile = wg.shared(CHUNK, BLOCK)
    copies = 3 + plan.parts * (1 + plan.erases) + (plan.erase_heads > 0) + 2 * (plan.gate == "channel")
    program = Program(
        at=None,
        q=tile,
        k=tile,
        erase=tile if plan.erase_heads else None,
        p=(tile,) * plan.parts,
        a=(tile,) * plan.parts if plan.erases else None,
        gates=wg.shared(2, CHUNK, BLOCK) if plan.gate == "channel" else None,
        scalars=wg.vectors(*inputs.tokens.scalars.shape[-2:]),
        sums=wg.vectors(kinds, CHUNK),
        whole=wg.vectors(BLOCK),
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
    return wg.kernel(body, inputs, results, program, grid, "delta_rule_gradients")


def _fetch(plan: Plan, inputs: Inputs, here: Program) -> None:
    batch, head, chunk, block = here.at
    now, channels = pl.ds(chunk * CHUNK, CHUNK), pl.ds(block * BLOCK, BLOCK)
    given = keys_of(plan, inputs.tokens, batch, head)
    copies = [
        (given.q.at[now, channels], here.q),
        (given.k.at[now, channels], here.k),
        *((x.at[batch, head, chunk], y) for x, y in zip(inputs.done.p, here.p, strict=True)),
        (inputs.tokens.scalars.at[batch, head, chunk], here.scalars),
    ]
    if plan.erase_heads:
        copies.append((given.erase.at[now, channels], here.erase))
    if plan.erases:
        copies += [(x.at[batch, head, chunk], y) for x, y in zip(inputs.done.a, here.a, strict=True)]
    if plan.gate == "channel":
        copies += [(inputs.tokens.gates.at[part, batch, now, head, channels], here.gates.at[part]) for part in (0, 1)]
    wg.load(here.full, *copies)


def _of_values(plan: Plan, inputs: Inputs, here: Program) -> Products:
    """Also writes the sums that need nothing else."""
    batch, head, chunk, block = here.at
    rows = pl.ds(block * BLOCK, BLOCK)

    def run(values: Values) -> Products:
        def arrive(value_block: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
            channels = pl.ds(value_block * BLOCK, BLOCK)
            now, states = (batch, pl.ds(chunk * CHUNK, CHUNK), head, channels), (batch, head, chunk, rows, channels)
            sources = [x.at[now] for x in (*inputs.y, *inputs.d_b, inputs.d_o)]
            sources += [x.at[states] for x in (inputs.states, inputs.d_states)]
            wg.load(values.full, *zip(sources, jax.tree.leaves(values[:5]), strict=True))
            wg.loaded(values.full)
            direct, whole = sums
            direct = direct + jnp.sum(wg.read_split(values.y) * wg.read_split(values.d_b), axis=1)
            return direct, whole + jnp.sum(wg.read(values.state) * wg.read(values.d_state), axis=1)

        d_o, state, d_state = (values.d_o,), (values.state,), (values.d_state,)
        pairs = Products(
            d_p=wg.split_pairs(d_o, values.y, turn_b=True),
            d_a=wg.split_pairs(values.d_b, values.y, turn_b=True) if plan.erases else None,
            d_q=wg.split_pairs(d_o, state, turn_b=True),
            d_erase=wg.split_pairs(values.d_b, state, turn_b=True) if plan.erases else None,
            d_k=wg.split_pairs(values.y, d_state, turn_b=True),
        )
        wanted = [n for n, sums in enumerate(pairs) if sums is not None]
        blocks, nothing = plan.value // BLOCK, (wg.zero_rows(CHUNK), wg.zero_rows(BLOCK))
        results, sums = wg.products_over(blocks, arrive, nothing, *(pairs[n] for n in wanted))
        here.sums[DIRECT], here.whole[...] = sums
        found = dict(zip(wanted, results, strict=True))
        return Products(*(found.get(n) for n in range(len(pairs))))

    tile = wg.shared(CHUNK, BLOCK)
    split, copies = (tile,) * plan.parts, 3 + 2 * plan.parts
    values = Values(split, split, tile, tile, tile, full=plgpu.Barrier(num_arrivals=copies))
    return pl.run_scoped(run, values, collective_axes="warpgroup")


def _leave(results: Gradients, here: Program, d_keys: Cotangents) -> None:
    """Writes the results, which take the places of what was fetched."""
    d_k = d_keys.k
    if d_keys.erase is not None and here.erase is None:
        d_k = d_k + d_keys.erase
    batch, head, chunk, block = here.at
    channels = pl.ds(block * BLOCK, BLOCK)
    now = (batch, pl.ds(chunk * CHUNK, CHUNK), head, channels)
    wg.put(here.q, d_keys.q)
    wg.put(here.k, d_k)
    copies = [
        (here.q, results.d_q.at[now]),
        (here.k, results.d_k.at[now]),
        (here.sums, results.sums.at[batch, head, chunk, block]),
        (here.whole, results.whole.at[batch, head, chunk, channels]),
    ]
    if d_keys.erase is not None and here.erase is not None:
        wg.put(here.erase, d_keys.erase)
        copies.append((here.erase, results.d_erase.at[now]))
    if d_keys.gates is not None:
        copies.append((d_keys.gates, results.d_gates.at[now]))
    wg.store(*copies)
    wg.stored(and_written=True)
