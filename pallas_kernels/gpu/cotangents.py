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

from pallas_kernels.gpu import products as mm
from pallas_kernels.gpu import warpgroup as wg
from pallas_kernels.gpu.arrays import Tokens, channels_of, keys_of, of_chunks, of_tokens, places_of
from pallas_kernels.gpu.levels import put_gates
from pallas_kernels.gpu.plan import BLOCK, CHUNK, Plan
from pallas_kernels.gpu.scores import Scores, cotangents_of_scores, over_values
from pallas_kernels.gpu.warpgroup import Ref

WRITES, READS = range(2)  # the last with a gate per head


class Inputs(NamedTuple):
    tokens: Tokens
    done: Any  # `Prepared`; the keys have no use for it
    y: Any  # Y in the plan's `parts`, bfloat16 [batch, time, heads * value] each
    d_b: Any  # dB likewise
    d_o: Any  # in the plan's `split`
    states: Any  # before every chunk in the plan's `split`, bfloat16 [batch, heads, chunks, key, value] each
    d_states: Any  # the cotangents of those after it, likewise


class Gradients(NamedTuple):
    """Every value head has its own, also of a key that it shares."""

    d_q: Any  # in the plan's `split`, bfloat16 [batch, time, heads * key] each
    d_k: Any
    d_erase: Any  # None where k erases: its cotangent then holds both
    d_gates: Ref  # a gate per channel, but for the whole: float32 [batch, time, heads * key]
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
    q: Any  # [64, 64] each
    k: Any
    erase: Any
    d_p: Any  # [64, 64] each
    d_a: Any
    gates: Ref  # [2, 64, 64]
    scalars: Ref  # [kinds, 64]
    of_scores: Ref  # their sums with a gate per channel, [kinds, 64]
    sums: Ref  # [kinds, 64]
    whole: Ref  # [64]
    full: Ref

    @property
    def erase_key(self) -> Any:
        return self.k if self.erase is None else self.erase


class Values(NamedTuple):
    """So many channels, `[64, plan.step]`, in parts."""

    y: Any
    d_b: Any
    d_o: Any
    state: Any
    d_state: Any


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
            _leave(plan, results, here, keys(here, products, scratch, constants))

        pl.run_scoped(rest, scratch, collective_axes="warpgroup")

    tile = (wg.shared(CHUNK, BLOCK),) * plan.split
    program = Program(
        at=None,
        q=tile,
        k=tile,
        erase=tile if plan.erase_heads else None,
        d_p=tile,
        d_a=tile if plan.erases else None,
        gates=wg.shared(2, CHUNK, BLOCK) if channel else None,
        scalars=wg.vectors(plan.kinds, CHUNK),
        of_scores=wg.vectors(*scores.sums.shape[-2:]) if channel else None,
        sums=wg.vectors(kinds, CHUNK),
        whole=wg.vectors(BLOCK),
        full=plgpu.Barrier(num_arrivals=1 + channel + plan.split * (3 + plan.erases + (plan.erase_heads > 0))),
    )
    keys_shape = (of_tokens(plan, plan.key),) * plan.split
    results = Gradients(
        d_q=keys_shape,
        d_k=keys_shape,
        d_erase=keys_shape if plan.erase_heads else None,
        d_gates=of_tokens(plan, plan.key, jnp.float32) if channel else None,
        sums=of_chunks(plan, plan.key_blocks, kinds, CHUNK, dtype=jnp.float32),
        whole=of_chunks(plan, plan.key, dtype=jnp.float32),
    )
    grid = {"block": plan.key_blocks, "chunk": plan.chunks, "head": plan.heads, "batch": plan.batch}
    inputs = inputs._replace(done=None, tokens=inputs.tokens._replace(v=None))
    return wg.kernel(
        plan.machine, body, (inputs, scores, constants), results, program, grid, "delta_rule_gradients"
    ), scores.sums


def _fetch(plan: Plan, inputs: Inputs, scores: Scores, here: Program) -> None:
    batch, head, chunk, block = here.at
    now = pl.ds(chunk * CHUNK, CHUNK)
    given = keys_of(plan, inputs.tokens, batch, head, now, block, BLOCK)
    copies = [
        (given.q, here.q),
        (given.k, here.k),
        (places_of(scores.d_p, (batch, head, chunk)), here.d_p),
        (inputs.tokens.scalars.at[batch, head, chunk], here.scalars),
    ]
    if plan.erase_heads:
        copies.append((given.erase, here.erase))
    if plan.erases:
        copies.append((places_of(scores.d_a, (batch, head, chunk)), here.d_a))
    if plan.gate == "channel":
        copies.append((scores.sums.at[batch, head, chunk], here.of_scores))
    wg.load(here.full, *copies)
    if plan.gate == "channel":
        put_gates(here.gates, inputs.tokens.gates.at[batch, now, channels_of(head, plan.key, block, BLOCK)])
        mm.commit()


def _of_values(plan: Plan, inputs: Inputs, here: Program) -> Products:
    """Also writes the sums that need nothing else."""
    batch, head, chunk, block = here.at
    rows = pl.ds(block * BLOCK, BLOCK)

    def sources(step: Array) -> Values:
        channels = pl.ds(step * plan.step, plan.step)
        now = (batch, pl.ds(chunk * CHUNK, CHUNK), channels_of(head, plan.value, step, plan.step))
        states = (batch, head, chunk, rows, channels)
        y, d_b, d_o = jax.tree.map(
            lambda x: x.at[now], (inputs.y, inputs.d_b[: plan.split] if plan.erases else None, inputs.d_o)
        )
        return Values(y, d_b, d_o, places_of(inputs.states, states), places_of(inputs.d_states, states))

    def sums(here: Values) -> list[mm.Pairs]:
        found: list[mm.Pairs] = [
            [(here.d_o, wg.turned(here.state))],
            [(here.y, wg.turned(here.d_state))],
        ]
        return [*found, [(here.d_b, wg.turned(here.state))]] if plan.erases else found

    def read(here: Values, whole: Array) -> Array:
        return whole + jnp.sum(wg.read(here.state) * wg.read(here.d_state), axis=1)

    (d_q, d_k, *d_erase), here.whole[...] = over_values(plan, sources, sums, 2 + plan.erases, read, wg.zero_rows(BLOCK))
    return Products(d_q, d_k, *d_erase)


def _leave(plan: Plan, results: Gradients, here: Program, d_keys: Cotangents) -> None:
    """Writes the results, which take the places of what was fetched."""
    batch, head, chunk, block = here.at
    channels = pl.ds(block * BLOCK, BLOCK)
    now = (batch, pl.ds(chunk * CHUNK, CHUNK), channels_of(head, plan.key, block, BLOCK))
    wg.put(here.q, d_keys.q)
    wg.put(here.k, d_keys.k)
    copies = [
        (here.q, places_of(results.d_q, now)),
        (here.k, places_of(results.d_k, now)),
        (here.sums, results.sums.at[batch, head, chunk, block]),
        (here.whole, results.whole.at[batch, head, chunk, channels]),
    ]
    if d_keys.erase is not None:
        wg.put(here.erase, d_keys.erase)
        copies.append((here.erase, places_of(results.d_erase, now)))
    if d_keys.gates is not None:
        wg.put(results.d_gates.at[now], d_keys.gates)
    wg.store(*copies)
    wg.stored(and_written=True)
