"""One token of B x H states: every state is read from memory and written back once, which is all that a step costs."""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.batching import joins_batch
from pallas_kernels.inputs import Inputs
from pallas_kernels.tpu.plan import MAX_HEADS, head_counts, vmem_bytes
from pallas_kernels.tpu.products import TILE, column, transposed


def delta_rule_step(state: Array, token: Inputs, scale: float) -> tuple[Array, Array]:
    """One token in float32: `state` `[batch, heads, key, value]`, arrays `[batch, heads, ...]`, a key for every head.

    Returns the output `[batch, heads, value]` in float32 and the new state. `erase=None` erases nothing.
    """
    return joins_batch(functools.partial(_step, scale))(state, token)


def _step(scale: float, state: Array, token: Inputs) -> tuple[Array, Array]:
    q, k, v, beta, g, erase = token
    batch, heads, key, value = state.shape
    counts = head_counts(heads, heads, key, value)
    here = max((n for n in counts if n <= MAX_HEADS), default=counts[0])
    f32 = jnp.float32
    rows = {
        "query": scale * q.astype(f32),
        "write": k.astype(f32) if beta is None else beta.astype(f32)[..., None] * k.astype(f32),
    }
    if erase is not None:
        rows["erase"] = erase.astype(f32)
    decay = None
    if g is not None and g.ndim == 3:
        rows["decay"] = jnp.exp(g.astype(f32))
    elif g is not None:
        decay = jnp.broadcast_to(jnp.exp(g.astype(f32))[..., None], (batch, heads, TILE))

    def body(state: Array, keys: Array, v: Array, decay: Array | None, out: Array, new: Array) -> None:
        columns = transposed(keys[0, 0])
        for h in range(here):
            wide = {kind: column(columns, n * here + h, TILE) for n, kind in enumerate(rows)}
            for start in range(0, value, TILE):
                width = min(TILE, value - start)
                part = pl.ds(start, width)
                key_of = {kind: x[:, :width] for kind, x in wide.items()}
                now = state[0, h, :, part]
                if "decay" in rows:
                    now = key_of["decay"] * now
                elif decay is not None:
                    now = decay[0, 0, h : h + 1, :width] * now
                error = v[0, 0, h : h + 1, part]
                if erase is not None:
                    error = error - jnp.sum(key_of["erase"] * now, 0, keepdims=True)
                now = now + key_of["write"] * error
                new[0, h, :, part] = now
                out[0, 0, h : h + 1, part] = jnp.sum(key_of["query"] * now, 0, keepdims=True)

    def heads_of(width: int, count: int = 1) -> pl.BlockSpec:
        return pl.BlockSpec((1, 1, count * here, width), lambda b, h: (b, h, 0, 0))

    def cut(x: Array) -> Array:
        return x.reshape(batch, heads // here, here, -1)

    states = pl.BlockSpec((1, here, key, value), lambda b, h: (b, h, 0, 0))
    out, new = pl.pallas_call(
        body,
        grid=(batch, heads // here),
        in_specs=[states, heads_of(key, len(rows)), heads_of(value), None if decay is None else heads_of(TILE)],
        out_specs=[heads_of(value), states],
        out_shape=[
            jax.ShapeDtypeStruct((batch, heads // here, here, value), f32),
            jax.ShapeDtypeStruct(state.shape, f32),
        ],
        input_output_aliases={0: 1},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=vmem_bytes()
        ),
        name="delta_rule_step",
    )(
        state.astype(f32),
        jnp.concatenate([cut(x) for x in rows.values()], 2),
        cut(v.astype(f32)),
        None if decay is None else cut(decay),
    )
    return out.reshape(batch, heads, value), new
