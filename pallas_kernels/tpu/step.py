"""A token, or a few, of B x H states: every state is read from memory and written back once, which is all that it costs.

A grid step handles some rows of the batch and some heads of each. Arrays come as projections leave them, heads side by side
on the lanes: what there is for every token, or for every write of a token, are blocks of one array.
"""

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.batching import joins_batch, one_by_one
from pallas_kernels.inputs import Inputs
from pallas_kernels.tpu.plan import MAX_HEADS, head_counts, repeated, rows_of_batch, side_by_side, vmem_bytes
from pallas_kernels.tpu.products import TILE, column, transposed
from pallas_kernels.tpu.tile import Ref

# Bytes of states a grid step. It waits for 0.15 us whatever it does, in which a TPU moves a quarter of a MiB, and what it
# computes begins slowly: at one MiB moving takes longer than both.
_LEAST = 2**20
_MOST, _MOST_WRITES = 16, 64  # heads of all rows a grid step, and writes of them: the loops over them are unrolled


def delta_rule_step(
    state: Array, inputs: Inputs, layer: Array | None = None, *, scale: float, erases: bool
) -> tuple[Array, Array]:
    """Some tokens that continue a state, few enough for an unrolled loop.

    Args:
      state: float32, `[batch, heads, key, value]`; with a layer `[layers, batch, heads, key, value]`.
      inputs: those of the op, with an axis of writes where it has one: `[batch, time, writes, heads, ...]`, without it for
        `q` and `g`.
      layer: an integer; the new state of this layer takes its place, and the others are not touched.
      scale, erases: as `forward` has them.

    Returns:
      Outputs `[batch, time, heads, value]` in the dtype of `v`, and the new state.
    """
    step = functools.partial(_step, scale, erases)
    if layer is not None:
        o, states = one_by_one(step)(state, layer, repeated(inputs, MAX_HEADS))
        return o, states

    def alone(state: Array, inputs: Inputs) -> tuple[Array, Array]:
        o, new = step(state[None], jnp.zeros((), jnp.int32), inputs)
        return o, new[0]

    o, state = joins_batch(alone)(state, repeated(inputs, MAX_HEADS))
    return o, state


class _Plan(NamedTuple):
    """The static choices of a call."""

    tokens: int
    writes: int  # of a token
    rows: int  # of the batch a grid step
    key_heads: int  # a grid step
    heads: int  # value heads a grid step
    key: int
    value: int
    gate: Literal["none", "head", "channel"]
    erases: Literal["", "write", "own", "shared"]  # with the write key or one of its own, of every value or key head
    scale: float


class _Blocks(NamedTuple):
    """The blocks of a grid step, a list of one for every token or write; without a gate or the like None.

    Of streams they are `[rows, heads * size]`; scalars lie together as `[rows, tokens or writes * all heads]`.
    """

    q: Any
    k: Any
    v: Any
    erase: Any
    g: Any
    decay: Any  # exp(g) of a gate of a head
    beta: Any


def _plan_of(scale: float, erases: bool, states: Array, inputs: Inputs) -> _Plan:
    batch, heads, key, value = states.shape[1:]
    per_key = heads // inputs.k.shape[-2]
    counts = head_counts(heads // per_key, heads, key, value)
    tokens, writes = inputs.k.shape[1:3]
    most = min(_MOST, _MOST_WRITES // (tokens * writes))
    rows = rows_of_batch(batch)
    while rows > 1 and rows * counts[0] > most:
        rows = max(n for n in range(1, rows) if rows % n == 0)
    fitting = [n for n in counts if rows * n <= most] or counts[:1]
    here = next((n for n in fitting if rows * n * key * value * 4 >= _LEAST), fitting[-1])
    gate: Literal["none", "head", "channel"] = "none"
    if inputs.g is not None:
        gate = "head" if inputs.g.ndim == 3 else "channel"
    erase: Literal["", "write", "own", "shared"] = "write" if erases else ""
    if inputs.erase is not None:
        erase = "own" if inputs.erase.shape[-2] == heads else "shared"
    return _Plan(tokens, writes, rows, here // per_key, here, key, value, gate, erase, scale)


def _step(scale: float, erases: bool, states: Array, layer: Array, inputs: Inputs) -> tuple[Array, Array]:
    if inputs.k.ndim == 4:  # one write
        written = (inputs.k, inputs.v, inputs.beta, inputs.erase)
        k, v, beta, erase = jax.tree.map(lambda x: x[:, :, None], written)
        inputs = Inputs(inputs.q, k, v, beta, inputs.g, erase)
    plan = _plan_of(scale, erases, states, inputs)
    batch, heads = states.shape[1:3]
    programs, rows, f32 = heads // plan.heads, plan.rows, jnp.float32
    total = plan.tokens * plan.writes

    def stream(x: Array | None, count: int, width: int) -> tuple[Any, Any]:
        """An array for each of so many tokens or writes, and its blocks: channels of a program."""
        if x is None:
            return None, None
        parts = side_by_side(x.reshape(batch, count, -1), rows)
        return [part for part, _ in parts], [
            pl.BlockSpec((None, rows, width), lambda h, b, layer, n=n: (b, 0, n * programs + h)) for _, n in parts
        ]

    def scalars(x: Array | None) -> tuple[Any, Any]:
        if x is None:
            return None, None
        x = x.astype(f32).reshape(batch // rows, rows, -1)
        space = pltpu.MemorySpace.SMEM
        return x, pl.BlockSpec((None, rows, x.shape[2]), lambda h, b, layer: (b, 0, 0), memory_space=space)

    g = inputs.g
    erase_heads = plan.heads if plan.erases == "own" else plan.key_heads
    pairs = _Blocks(
        q=stream(inputs.q, plan.tokens, plan.key_heads * plan.key),
        k=stream(inputs.k, total, plan.key_heads * plan.key),
        v=stream(inputs.v, total, plan.heads * plan.value),
        erase=stream(inputs.erase, total, erase_heads * plan.key),
        g=stream(g if plan.gate == "channel" else None, plan.tokens, plan.heads * plan.key),
        decay=scalars(jnp.exp(g.astype(f32)) if g is not None and plan.gate == "head" else None),
        beta=scalars(inputs.beta),
    )
    arrays, blocks = (_Blocks(*(pair[n] for pair in pairs)) for n in range(2))
    of_layer = pl.BlockSpec((None, rows, plan.heads, plan.key, plan.value), lambda h, b, layer: (layer[0], b, h, 0, 0))
    out = pl.BlockSpec((None, rows, plan.heads * plan.value), lambda h, b, layer: (b, 0, h))
    o, new = pl.pallas_call(
        functools.partial(_body, plan, heads),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(programs, batch // rows),
            in_specs=[of_layer, blocks],
            out_specs=[[out] * plan.tokens, of_layer],
            scratch_shapes=[pltpu.VMEM((plan.tokens, rows, plan.value), f32)],
        ),
        out_shape=[
            [jax.ShapeDtypeStruct((batch // rows, rows, heads * plan.value), inputs.v.dtype)] * plan.tokens,
            jax.ShapeDtypeStruct(states.shape, f32),
        ],
        input_output_aliases={1: plan.tokens},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=vmem_bytes()
        ),
        name="delta_rule_step",
    )(layer.astype(jnp.int32).reshape(1), states.astype(f32), arrays)
    return jnp.stack([x.reshape(batch, heads, plan.value) for x in o], 1), new


class _Head(NamedTuple):
    """What a value head's tokens bring, of all rows."""

    columns: dict[str, list[Array]]  # float32 `[key, rows]` for every token or write, by what is done with them
    values: list[Array]  # float32 `[rows, value]` for every write
    decay: list[list[Array]] | None  # for every token and row a number; None without a gate of a head
    beta: list[list[Array]] | None  # for every write and row


def _body(
    plan: _Plan, all_heads: int, layer: Ref, state: Ref, given: _Blocks, out: list[Ref], new: Ref, o: Ref
) -> None:
    del layer
    first = pl.program_id(0) * plan.heads
    for h in range(plan.heads):

        def scalars(x: Ref | None, count: int, h: int = h) -> list[list[Array]] | None:
            if x is None:
                return None
            return [[x[b, n * all_heads + first + h] for b in range(plan.rows)] for n in range(count)]

        of_value = slice(h * plan.value, (h + 1) * plan.value)
        head = _Head(
            _columns(plan, given, h),
            [v[:, of_value].astype(jnp.float32) for v in given.v],
            scalars(given.decay, plan.tokens),
            scalars(given.beta, plan.tokens * plan.writes),
        )
        for b in range(plan.rows):
            for start in range(0, plan.value, TILE):
                part = slice(start, min(start + TILE, plan.value))
                new[b, h, :, part] = _continued(plan, head, state[b, h, :, part], b, part, o)
        for t in range(plan.tokens):
            out[t][:, of_value] = o[t].astype(out[t].dtype)


def _continued(plan: _Plan, head: _Head, state: Array, b: int, part: slice, o: Ref) -> Array:
    """Some columns of a state after all tokens of a row; what they read goes to `o`, `[tokens, rows, value]`."""
    width = part.stop - part.start

    def key(kind: str, n: int) -> Array:
        return column(head.columns[kind][n], b, width)

    for t in range(plan.tokens):
        if plan.gate == "channel":
            state = key("decay", t) * state
        elif head.decay is not None:
            state = head.decay[t][b] * state
        for n in range(t * plan.writes, (t + 1) * plan.writes):
            error = head.values[n][b : b + 1, part]
            if plan.erases:
                error = error - jnp.sum(key("erase", n) * state, 0, keepdims=True)
            if head.beta is not None:
                error = head.beta[n][b] * error
            state = state + key("write", n) * error
        o[t, b : b + 1, part] = jnp.sum(key("query", t) * state, 0, keepdims=True)
    return state


def _columns(plan: _Plan, given: _Blocks, h: int) -> dict[str, list[Array]]:
    """Those of a value head."""

    def columns(blocks: list[Ref], head: int) -> list[Array]:
        here = slice(head * plan.key, (head + 1) * plan.key)
        return [transposed(x[:, here].astype(jnp.float32)) for x in blocks]

    shared = h * plan.key_heads // plan.heads
    write = columns(given.k, shared)
    found = {"query": [plan.scale * x for x in columns(given.q, shared)], "write": write, "erase": write}
    if given.erase is not None:
        found["erase"] = columns(given.erase, h if plan.erases == "own" else shared)
    if plan.gate == "channel":
        found["decay"] = [jnp.exp(x) for x in columns(given.g, h)]
    return found
