"""What the cotangents of keys and scalars share with and without a gate per channel.

A program handles one chunk of one head and a block of the key's channels. First it takes from the values what it wants of
them, three products of 64 x 64 summed over blocks of their channels, while the keys arrive; then the values leave shared
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
from pallas_kernels.gpu.arrays import Tokens, keys_of, of_chunks, of_tokens
from pallas_kernels.gpu.levels import put_gates
from pallas_kernels.gpu.plan import BLOCK, CHUNK, Plan
from pallas_kernels.gpu.scores import STEP, Scores, cotangents_of_scores, over_values
from pallas_kernels.gpu.warpgroup import Ref

WRITES, READS = range(2)  # the last with a gate per head


class Inputs(NamedTuple):
    tokens: Tokens
    done: Any  # `Prepared`; the keys have no use for it
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
    sums: Ref  # READS and WRITES, to be summed over blocks: float32 [batch, heads, chunks, key blocks, kinds, 64]
    whole: Ref  # the row sums of S * dS', float32 [batch, heads, chunks, key]


class Products(NamedTuple):
    """What the values give, `[64, 64]`."""

    d_q: Array  # dO S^T
    d_k: Array  # Y dS'^T
    d_erase: Any = None  # dB S^T, if anything erases


class Cotangents(NamedTuple):
    q: Array
    k: Array  # holds that of the erase key where k erases
    erase: Array | None
    gates: Array | None


class Program(NamedTuple):
    """Where a program is, and its shared memory for what is not of the values."""

    at: Any  # batch, head, chunk and block of the key
    q: Ref  # [64, 64]
    k: Ref
    erase: Ref
    d_p: Ref  # [64, 64]
    d_a: Ref
    gates: Ref  # [2, 64, 64]
    scalars: Ref  # [kinds, 64]
    of_scores: Ref  # their sums with a gate per channel, [kinds, 64]
    sums: Ref  # [kinds, 64]
    whole: Ref  # [64]
    full: Ref

    @property
    def erase_key(self) -> Ref:
        return self.k if self.erase is None else self.erase


class Values(NamedTuple):
    """So many channels, `[64, STEP]`; the first two in parts."""

    y: Any
    d_b: Any
    d_o: Ref
    state: Ref
    d_state: Ref


def launch(
    plan: Plan,
    inputs: Inputs,
    keys: Callable[[Program, Products, Any, Any], Cotangents],
    scratch: Any,
    constants: Any = None,
) -> tuple[Gradients, Array]:
    """Runs `keys(program, products, scratch, constants)`, the cotangents of q, k, erase key and gates, everywhere.

    The second result is the sums of `pallas_kernels.gpu.scores`.
    """
    channel = plan.gate == "channel"
    kinds = 2 if plan.gate == "head" else 1
    scores = cotangents_of_scores(plan, inputs.done, inputs.tokens.scalars, inputs.y, inputs.d_b, inputs.d_o)

    def body(given: tuple[Inputs, Scores, Any], results: Gradients, here: Program) -> None:
        inputs, scores, constants = given
        here = here._replace(at=wg.place("batch", "head", "chunk", "block"))
        _fetch(plan, inputs, scores, here)
        products = _of_values(plan, inputs, here)
        wg.loaded(here.full)

        def rest(scratch: Any) -> None:
            _leave(results, here, keys(here, products, scratch, constants))

        pl.run_scoped(rest, scratch, collective_axes="warpgroup")

    tile = wg.shared(CHUNK, BLOCK)
    program = Program(
        at=None,
        q=tile,
        k=tile,
        erase=tile if plan.erase_heads else None,
        d_p=tile,
        d_a=tile if plan.erases else None,
        gates=wg.shared(2, CHUNK, BLOCK) if channel else None,
        scalars=wg.vectors(*inputs.tokens.scalars.shape[-2:]),
        of_scores=wg.vectors(*scores.sums.shape[-2:]) if channel else None,
        sums=wg.vectors(kinds, CHUNK),
        whole=wg.vectors(BLOCK),
        full=plgpu.Barrier(num_arrivals=4 + plan.erases + (plan.erase_heads > 0) + channel),
    )
    results = Gradients(
        d_q=of_tokens(plan, plan.key),
        d_k=of_tokens(plan, plan.key),
        d_erase=of_tokens(plan, plan.key) if plan.erase_heads else None,
        d_gates=of_tokens(plan, plan.key, jnp.float32) if channel else None,
        sums=of_chunks(plan, plan.key_blocks, kinds, CHUNK, dtype=jnp.float32),
        whole=of_chunks(plan, plan.key, dtype=jnp.float32),
    )
    grid = {"block": plan.key_blocks, "chunk": plan.chunks, "head": plan.heads, "batch": plan.batch}
    inputs = inputs._replace(done=None, tokens=inputs.tokens._replace(v=None))
    return wg.kernel(body, (inputs, scores, constants), results, program, grid, "delta_rule_gradients"), scores.sums


def _fetch(plan: Plan, inputs: Inputs, scores: Scores, here: Program) -> None:
    batch, head, chunk, block = here.at
    now, channels = pl.ds(chunk * CHUNK, CHUNK), pl.ds(block * BLOCK, BLOCK)
    given = keys_of(plan, inputs.tokens, batch, head)
    copies = [
        (given.q.at[now, channels], here.q),
        (given.k.at[now, channels], here.k),
        (scores.d_p.at[batch, head, chunk], here.d_p),
        (inputs.tokens.scalars.at[batch, head, chunk], here.scalars),
    ]
    if plan.erase_heads:
        copies.append((given.erase.at[now, channels], here.erase))
    if plan.erases:
        copies.append((scores.d_a.at[batch, head, chunk], here.d_a))
    if plan.gate == "channel":
        copies.append((scores.sums.at[batch, head, chunk], here.of_scores))
    wg.load(here.full, *copies)
    if plan.gate == "channel":
        put_gates(here.gates, inputs.tokens.gates.at[batch, now, head, channels])
        plgpu.commit_smem()


def _of_values(plan: Plan, inputs: Inputs, here: Program) -> Products:
    """Also writes the sums that need nothing else."""
    batch, head, chunk, block = here.at
    rows = pl.ds(block * BLOCK, BLOCK)

    def sources(step: Array) -> Values:
        channels = pl.ds(step * STEP, STEP)
        now, states = (batch, pl.ds(chunk * CHUNK, CHUNK), head, channels), (batch, head, chunk, rows, channels)
        y, d_b, d_o = jax.tree.map(lambda x: x.at[now], (inputs.y, inputs.d_b if plan.erases else None, inputs.d_o))
        return Values(y, d_b, d_o, inputs.states.at[states], inputs.d_states.at[states])

    def sums(here: Values) -> list[wg.Pairs]:
        found: list[wg.Pairs] = [
            wg.split_pairs((here.d_o,), (here.state,), turn_b=True),
            wg.split_pairs(here.y, (here.d_state,), turn_b=True),
        ]
        return [*found, wg.split_pairs(here.d_b, (here.state,), turn_b=True)] if plan.erases else found

    def read(here: Values, whole: Array) -> Array:
        return whole + jnp.sum(wg.read(here.state) * wg.read(here.d_state), axis=1)

    (d_q, d_k, *d_erase), here.whole[...] = over_values(plan, sources, sums, 2 + plan.erases, read, wg.zero_rows(BLOCK))
    return Products(d_q, d_k, *d_erase)


def _leave(results: Gradients, here: Program, d_keys: Cotangents) -> None:
    """Writes the results, which take the places of what was fetched."""
    batch, head, chunk, block = here.at
    channels = pl.ds(block * BLOCK, BLOCK)
    now = (batch, pl.ds(chunk * CHUNK, CHUNK), head, channels)
    wg.put(here.q, d_keys.q)
    wg.put(here.k, d_keys.k)
    copies = [
        (here.q, results.d_q.at[now]),
        (here.k, results.d_k.at[now]),
        (here.sums, results.sums.at[batch, head, chunk, block]),
        (here.whole, results.whole.at[batch, head, chunk, channels]),
    ]
    if d_keys.erase is not None:
        wg.put(here.erase, d_keys.erase)
        copies.append((here.erase, results.d_erase.at[now]))
    if d_keys.gates is not None:
        wg.put(results.d_gates.at[now], d_keys.gates)
    wg.store(*copies)
    wg.stored(and_written=True)
