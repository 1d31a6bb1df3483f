"""One token of B x H states: every state is read from memory and written back once, which is all that a step costs."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.batching import joins_batch
from pallas_kernels.inputs import Inputs
from pallas_kernels.tpu.plan import MAX_HEADS, head_counts, vmem_bytes
from pallas_kernels.tpu.products import TILE, column, transposed

# Bytes of states a grid step. It waits for 0.15 us whatever it does, in which a TPU moves a quarter of a MiB, and what it
# computes begins slowly: at one MiB moving takes longer than both.
_LEAST = 2**20


def delta_rule_step(state: Array, token: Inputs, scale: float, layer: Array | None = None) -> tuple[Array, Array]:
    """One token in float32: `state` `[batch, heads, key, value]`, arrays `[batch, heads, ...]`, a key for every head.

    Returns the output `[batch, heads, value]` in float32 and the new state. `erase=None` erases nothing. With a `layer`,
    an integer, `state` is `[layers, batch, heads, key, value]`: the new one of this layer takes its place, and the others
    are not touched.
    """
    if layer is not None:
        return _among_layers(scale, state, layer, token)

    def alone(state: Array, token: Inputs) -> tuple[Array, Array]:
        o, new = _step(scale, state[None], jnp.zeros((), jnp.int32), token)
        return o, new[0]

    return joins_batch(alone)(state, token)


def _among_layers(scale: float, states: Array, layer: Array, token: Inputs) -> tuple[Array, Array]:
    step = jax.custom_batching.custom_vmap(functools.partial(_step, scale))

    def apart(states: Array, layer: Array, token: Inputs) -> tuple[Array, Array]:
        state = jax.lax.dynamic_index_in_dim(states, layer, keepdims=False)
        o, state = delta_rule_step(state, token, scale)
        return o, jax.lax.dynamic_update_index_in_dim(states, state, layer, 0)

    @step.def_vmap
    def _(size: int, batched: Any, *arguments: Any) -> tuple[Any, Any]:
        del size
        axes = jax.tree.map(lambda is_batched: 0 if is_batched else None, tuple(batched))
        return jax.vmap(apart, axes)(*arguments), (True, True)

    result: tuple[Array, Array] = step(states, layer, token)
    return result


def _rows(batch: int, heads: int, size: int) -> int:
    """Rows of the batch a grid step, each of so many heads with states of `size` bytes; the loop over them is unrolled."""
    fitting = [n for n in range(1, batch + 1) if batch % n == 0 and n * heads <= 2 * MAX_HEADS] or [1]
    return next((n for n in fitting if n * heads * size >= _LEAST), fitting[-1])


def _step(scale: float, states: Array, layer: Array, token: Inputs) -> tuple[Array, Array]:
    q, k, v, beta, g, erase = token
    _, batch, heads, key, value = states.shape
    counts = head_counts(heads, heads, key, value)
    here = max((n for n in counts if n <= MAX_HEADS), default=counts[0])
    f32 = jnp.float32
    together = _rows(batch, here, key * value * 4)
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

    def body(layer: Array, state: Array, keys: Array, v: Array, decay: Array | None, out: Array, new: Array) -> None:
        del layer
        for b in range(together):
            columns = transposed(keys[b, 0])
            for h in range(here):
                wide = {kind: column(columns, n * here + h, TILE) for n, kind in enumerate(rows)}
                for start in range(0, value, TILE):
                    width = min(TILE, value - start)
                    part = pl.ds(start, width)
                    key_of = {kind: x[:, :width] for kind, x in wide.items()}
                    now = state[b, h, :, part]
                    if "decay" in rows:
                        now = key_of["decay"] * now
                    elif decay is not None:
                        now = decay[b, 0, h : h + 1, :width] * now
                    error = v[b, 0, h : h + 1, part]
                    if erase is not None:
                        error = error - jnp.sum(key_of["erase"] * now, 0, keepdims=True)
                    now = now + key_of["write"] * error
                    new[b, h, :, part] = now
                    out[b, 0, h : h + 1, part] = jnp.sum(key_of["query"] * now, 0, keepdims=True)

    def heads_of(width: int, count: int = 1) -> pl.BlockSpec:
        return pl.BlockSpec((together, 1, count * here, width), lambda b, h, layer: (b, h, 0, 0))

    def cut(x: Array) -> Array:
        return x.reshape(batch, heads // here, here, -1)

    of_layer = pl.BlockSpec((None, together, here, key, value), lambda b, h, layer: (layer[0], b, h, 0, 0))
    out, new = pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch // together, heads // here),
            in_specs=[of_layer, heads_of(key, len(rows)), heads_of(value), None if decay is None else heads_of(TILE)],
            out_specs=[heads_of(value), of_layer],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((batch, heads // here, here, value), f32),
            jax.ShapeDtypeStruct(states.shape, f32),
        ],
        input_output_aliases={1: 1},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=vmem_bytes()
        ),
        name="delta_rule_step",
    )(
        layer.astype(jnp.int32).reshape(1),
        states.astype(f32),
        jnp.concatenate([cut(x) for x in rows.values()], 2),
        cut(v.astype(f32)),
        None if decay is None else cut(decay),
    )
    return out.reshape(batch, heads, value), new
