"""One token of B x H states: every state is read from memory and written back once, which is all that a step costs.

With a state S of one head, d = exp(g) of its channels, and the key e that erases,

    S <- d S        S <- S + beta k (v - e^T S)^T        o = scale S^T q

A program holds a block of the value's channels in registers; sums over the key run along the columns. The new state takes
the place of the old one: a loop over tokens, or a caller who donates the state, copies none.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.batching import joins_batch
from pallas_kernels.gpu import warpgroup as wg
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


def delta_rule_step(state: Array, token: Inputs, scale: float) -> tuple[Array, Array]:
    """One token in float32: `state` `[batch, heads, key, value]`, arrays `[batch, heads, ...]`, a key for every head.

    Returns the output `[batch, heads, value]` in float32 and the new state. `erase=None` erases nothing.
    """
    return joins_batch(functools.partial(_step, scale))(state, token)


def _step(scale: float, state: Array, token: Inputs) -> tuple[Array, Array]:
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
        body,
        Token(held, jnp.stack(list(keys.values()), 2), v.astype(f32)),
        jax.ShapeDtypeStruct((batch, heads, value), f32),
        StepScratch(here, wg.vectors(block), plgpu.Barrier(num_arrivals=3)),
        {"block": value // block, "head": heads, "batch": batch},
        "delta_rule_step",
    )
    return o, jax.freeze(held)
