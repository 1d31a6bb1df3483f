"""One token of B x H states: every state is read from memory and written back once, which is all that a step costs.

With a state S of one head, d = exp(g) of its channels, and the key e that erases,

    S <- d S        S <- S + beta k (v - e^T S)^T        o = scale S^T q

A program holds a block of the value's channels in registers; sums over the key run along the columns. The new state takes
the place of the old one: a loop over tokens, or a caller who donates the state, copies none.
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.batching import joins_batch
from pallas_kernels.gpu import warpgroup as wg
from pallas_kernels.gpu.machine import Machine
from pallas_kernels.gpu.plan import BLOCK
from pallas_kernels.gpu.warpgroup import Ref
from pallas_kernels.inputs import Inputs


class Token(NamedTuple):
    """Arrays, or shared memory, of float32."""

    state: Ref  # [batch, heads, key, value]; written too
    keys: Ref  # scale q, beta k, and where there are such: exp(g), erase key: [batch, heads, kinds, key]
    v: Ref  # [batch, heads, value]


class StepScratch(NamedTuple):
    token: Token
    out: Ref
    full: Ref


def delta_rule_step(
    machine: Machine, state: Array, inputs: Inputs, *, scale: float, erases: bool
) -> tuple[Array, Array]:
    """Some tokens that continue a state, float32 `[batch, heads, key, value]`, write by write.

    `inputs` are those of the op, `[batch, time, heads, ...]`, and where a token has several writes `[batch, time, writes,
    heads, ...]`, but for `q` and `g`; `scale` and `erases` as `forward` has them.

    Returns outputs `[batch, time, heads, value]` in the dtype of `v`, and the new state.
    """
    step, outputs = joins_batch(functools.partial(_step, machine, scale)), []
    for token in _tokens(inputs, erases):
        for write in token:
            o, state = step(state, write)
        outputs.append(o.astype(inputs.v.dtype))
    return jnp.stack(outputs, 1), state


def _tokens(inputs: Inputs, erases: bool) -> list[list[Inputs]]:
    """The writes of every token, with keys for every value head: the first has the gate, the last output is the token's.

    Without an erase key nothing is erased.
    """
    per_key = inputs.v.shape[-2] // inputs.k.shape[-2]
    q, k = (jnp.repeat(x, per_key, -2) for x in (inputs.q, inputs.k))
    erase = k if inputs.erase is None else jnp.repeat(inputs.erase, inputs.v.shape[-2] // inputs.erase.shape[-2], -2)
    written = (k, inputs.v, inputs.beta, erase if erases else None)
    if k.ndim == q.ndim:
        written = jax.tree.map(lambda x: x[:, :, None], written)

    def token(t: int) -> Iterator[Inputs]:
        for n in range(written[0].shape[2]):
            k, v, beta, erase = jax.tree.map(lambda x: x[:, t, n], written)  # noqa: B023
            yield Inputs(q[:, t], k, v, beta, inputs.g[:, t] if inputs.g is not None and n == 0 else None, erase)

    return [list(token(t)) for t in range(q.shape[1])]


def _step(machine: Machine, scale: float, state: Array, token: Inputs) -> tuple[Array, Array]:
    q, k, v, beta, g, erase = token
    batch, heads, key, value = state.shape
    block, f32 = 32 if key == 256 else BLOCK, jnp.float32
    keys = {
        "query": scale * q.astype(f32),
        "write": k.astype(f32) if beta is None else beta.astype(f32)[..., None] * k.astype(f32),
    }
    if g is not None:
        decay = jnp.exp(g.astype(f32))
        keys["decay"] = jnp.broadcast_to(decay.reshape(batch, heads, -1), (batch, heads, key))
    if erase is not None:
        keys["erase"] = erase.astype(f32)

    def body(token: Token, o: Ref, scratch: StepScratch) -> None:
        batch, head, which = wg.place("batch", "head", "block")
        channels, here = pl.ds(which * block, block), scratch.token
        wg.load(
            scratch.full,
            (token.state.at[batch, head, :, channels], here.state),
            (token.keys.at[batch, head], here.keys),
            (token.v.at[batch, head, channels], here.v),
        )
        wg.loaded(scratch.full)

        def of_key(kind: str) -> Array:
            return wg.each_row(wg.along_rows(here.keys.at[list(keys).index(kind)]), block)

        now, error = wg.read(here.state), wg.along_columns(here.v)
        if g is not None:
            now = now * of_key("decay")
        if erase is not None:
            error = error - jnp.sum(of_key("erase") * now, axis=0)
        now = now + of_key("write") * wg.each_column(error, key)
        wg.put(here.state, now)
        scratch.out[...] = jnp.sum(of_key("query") * now, axis=0)
        wg.store(
            (here.state, token.state.at[batch, head, :, channels]),
            (scratch.out, o.at[batch, head, channels]),
        )
        wg.stored(and_written=True)

    here = Token(wg.shared(key, block, dtype=f32), wg.vectors(len(keys), key), wg.vectors(block))
    held = jax.new_ref(state.astype(f32))
    o = wg.kernel(
        machine,
        body,
        Token(held, jnp.stack(list(keys.values()), 2), v.astype(f32)),
        jax.ShapeDtypeStruct((batch, heads, value), f32),
        StepScratch(here, wg.vectors(block), plgpu.Barrier(num_arrivals=3)),
        {"block": value // block, "head": heads, "batch": batch},
        "delta_rule_step",
    )
    return o, jax.freeze(held)
