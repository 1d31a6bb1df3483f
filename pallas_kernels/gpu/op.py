"""The general delta rule on a GPU: outputs and cotangents by the kernels, and the layouts they want."""

import functools
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from pallas_kernels.batching import joins_batch
from pallas_kernels.gpu.arrays import BETA, START, Prepared, Tokens
from pallas_kernels.gpu.cotangents import READS, WRITES
from pallas_kernels.gpu.cotangents import Inputs as Given
from pallas_kernels.gpu.gradients import gradients
from pallas_kernels.gpu.machine import Machine
from pallas_kernels.gpu.pieces import ends_of_pieces, starts_of_pieces
from pallas_kernels.gpu.plan import CHUNK, Plan, pieces_of, split_of
from pallas_kernels.gpu.prepare import prepare
from pallas_kernels.gpu.reverse import reverse
from pallas_kernels.gpu.scan import scan
from pallas_kernels.gpu.scores import COLUMNS, DIRECT, PAIRS
from pallas_kernels.inputs import Inputs, base_two, gate_gradient, padded, suffix_sums, with_resets


class Kept(NamedTuple):
    """What the backward needs of the forward."""

    done: Prepared
    y: Any  # of `ScanResults`
    states: Any
    transitions: Array | None  # of `pallas_kernels.gpu.pieces`


def forward(
    machine: Machine,
    arrays: Inputs,
    initial_state: Array | None,
    reset: Array | None,
    *,
    scale: float,
    erases: bool,
    keep: bool,
) -> tuple[Array, Array, Kept | None]:
    """Outputs over all tokens, `[batch, time, heads, value]`, and final states, `[batch, heads, key, value]`.

    The arrays are those of the op with one write a token, `erase=None` erases with `k` unless `erases` is false, `reset`
    `[batch, time]` is true where a segment starts; `plan.unsupported` tells what the kernels cannot take. With
    `keep` also what `backward` needs of it.
    """
    inputs = _inputs(machine, arrays, reset)

    def run(inputs: Inputs, initial_state: Array | None) -> tuple[Array, Array, Kept | None]:
        plan = plan_of(machine, inputs, scale, erases)
        tokens = tokens_of(inputs, plan)
        done = prepare(plan, tokens, for_backward=keep)
        starts, transitions = starts_of_pieces(plan, tokens, done, _float32(initial_state))
        results = scan(plan, tokens, done, starts, want="kept" if keep else "outputs")
        kept = Kept(done, results.y, results.states, transitions) if keep else None
        return _by_head(_whole(results.o, inputs.v.dtype), plan.heads), results.state[:, :, -1], kept

    o, state, kept = joins_batch(run)(inputs, initial_state)
    return o[:, : arrays.v.shape[1]], state, kept


def backward(
    machine: Machine,
    arrays: Inputs,
    initial_state: Array | None,
    reset: Array | None,
    kept: Kept,
    d_o: Array,
    d_state: Array,
    *,
    scale: float,
    erases: bool,
) -> tuple[Inputs, Array]:
    """Cotangents of the arrays of `forward`, and always, in float32, of the initial state.

    They follow from what `forward` kept, and the cotangents of its results. Once: this has no gradient itself.
    """
    del initial_state
    inputs, pull = jax.vjp(lambda arrays: _inputs(machine, arrays, reset), arrays)
    d_o = jnp.pad(d_o, ((0, 0), (0, inputs.v.shape[1] - arrays.v.shape[1]), (0, 0), (0, 0)))
    find = joins_batch(functools.partial(_cotangents, machine, scale, erases))
    d_inputs, d_state = find(inputs, kept, d_o, d_state)
    (d_arrays,) = pull(d_inputs)
    return d_arrays, d_state


def _inputs(machine: Machine, arrays: Inputs, reset: Array | None) -> Inputs:
    """The op's arrays as the kernels take them: resets in the gates, whole pieces of chunks of 64 tokens."""
    batch, time, heads, value = arrays.v.shape
    pieces = pieces_of(machine, batch * heads, -(-time // CHUNK), arrays.k.shape[3], value, exact=False)
    return padded(arrays._replace(g=with_resets(arrays.g, reset, arrays.v)), -time % (CHUNK * pieces))


def plan_of(machine: Machine, inputs: Inputs, scale: float, erases: bool) -> Plan:
    batch, time, heads, value = inputs.v.shape
    key, chunks = inputs.k.shape[3], time // CHUNK
    return Plan(
        machine=machine,
        batch=batch,
        key_heads=inputs.k.shape[2],
        heads=heads,
        chunks=chunks,
        key=key,
        value=value,
        gate=inputs.gate,
        erase_heads=0 if inputs.erase is None else inputs.erase.shape[2],
        erases=erases,
        scale=scale,
        split=split_of(inputs.v),
        pieces=pieces_of(machine, batch * heads, chunks, key, value, exact=True),
    )


def _cotangents(
    machine: Machine,
    scale: float,
    erases: bool,
    inputs: Inputs,
    kept: Kept,
    d_o: Array,
    d_state: Array,
) -> tuple[Inputs, Array]:
    """Cotangents of the inputs and, in float32, of the initial state."""
    plan = plan_of(machine, inputs, scale, erases)
    tokens = tokens_of(inputs, plan)
    done = kept.done
    of_o = _split(_side_by_side(d_o), plan)
    back = reverse(plan, tokens, done, of_o, ends_of_pieces(plan, tokens, done, of_o, d_state, kept.transitions))
    found, one = gradients(plan, Given(tokens, done, kept.y, back.d_b, of_o, kept.states, back.d_states))

    def of_heads(parts: tuple[Array, ...], heads: int) -> Array:
        """The sum over the value heads that share a head."""
        d = _by_head(_whole(parts, jnp.float32), plan.heads)
        shape = (*d.shape[:2], heads, -1, plan.key)
        return (d if heads == plan.heads else jnp.sum(d.reshape(shape), 3)).astype(inputs.q.dtype)

    blocks = jnp.sum(found.sums, 3)
    d_inputs = Inputs(
        q=of_heads(found.d_q, plan.key_heads),
        k=of_heads(found.d_k, plan.key_heads),
        v=_by_head(_whole(back.d_b[: plan.split], inputs.v.dtype), plan.heads),
        beta=None,
        g=None,
        erase=of_heads(found.d_erase, plan.erase_heads) if plan.erase_heads else None,
    )
    beta = tokens.scalars[:, :, :, BETA]
    if inputs.beta is not None:
        # dB_j = beta_j U_j and d_beta_j = Y_j . U_j: where beta is not zero this needs no sum that cancels.
        all_sums = one[..., COLUMNS, :] + blocks[..., WRITES, :]
        direct = one[..., DIRECT, :] / jnp.where(beta == 0.0, 1.0, beta)
        d_beta = _by_token(jnp.where(beta == 0.0, all_sums, direct))
        d_inputs = d_inputs._replace(beta=d_beta.astype(inputs.beta.dtype))
    if inputs.g is not None and plan.gate == "head":
        whole = tokens.scalars[:, :, :, START, -1] * jnp.sum(found.whole, -1)
        d_g = gate_gradient(one[..., PAIRS, :], blocks[..., READS, :], beta * blocks[..., WRITES, :], whole[..., None])
        d_inputs = d_inputs._replace(g=_by_token(d_g).astype(inputs.g.dtype))
    if inputs.g is not None and plan.gate == "channel":
        whole = (found.whole * done.whole).transpose(0, 2, 1, 3)[:, :, None]
        d_g = found.d_gates.reshape(plan.batch, plan.chunks, CHUNK, plan.heads, plan.key) + whole
        d_inputs = d_inputs._replace(g=d_g.reshape(inputs.g.shape).astype(inputs.g.dtype))
    return d_inputs, back.d_state[:, :, 0]


def _float32(state: Array | None) -> Array | None:
    return None if state is None else state.astype(jnp.float32)


def tokens_of(inputs: Inputs, plan: Plan) -> Tokens:
    """The arrays as the kernels read them: a chunk's scalars side by side."""
    beta = jnp.ones(inputs.v.shape[:3], jnp.float32) if inputs.beta is None else inputs.beta
    scalars, gates = [_by_chunk(beta, plan)], None
    if plan.gate == "channel" and inputs.g is not None:
        gates = inputs.g.astype(jnp.float32)
    if plan.gate == "head" and inputs.g is not None:
        gate = base_two(_by_chunk(inputs.g, plan))
        after = jnp.pad(gate[..., 1:], ((0, 0),) * 3 + ((0, 1),))
        scalars += [gate, jnp.exp2(jnp.cumsum(gate, -1)), jnp.exp2(suffix_sums(after))]
    q, k, v, erase = (None if x is None else _split(_side_by_side(x), plan) for x in (*inputs[:3], inputs.erase))
    return Tokens(q, k, v, erase, None if gates is None else _side_by_side(gates), jnp.stack(scalars, 3))


def _split(x: Array, plan: Plan) -> tuple[Array, ...]:
    """As a sum of so many of bfloat16 as the kernels take."""
    if plan.split == 1:
        return (x,)
    # Not a conversion and its reverse, which XLA may leave out.
    high = lax.reduce_precision(x.astype(jnp.float32), 8, 7)
    return high.astype(jnp.bfloat16), (x.astype(jnp.float32) - high).astype(jnp.bfloat16)


def _whole(parts: tuple[Array, ...], dtype: DTypeLike) -> Array:
    """The sum of parts."""
    if len(parts) == 1:
        return parts[0].astype(dtype)
    return functools.reduce(operator.add, (x.astype(jnp.float32) for x in parts)).astype(dtype)


def _side_by_side(x: Array) -> Array:
    """`[batch, time, heads, width]` as `[batch, time, heads * width]`."""
    return x.reshape(*x.shape[:2], -1)


def _by_head(x: Array, heads: int) -> Array:
    """The reverse of `_side_by_side`."""
    return x.reshape(*x.shape[:2], heads, -1)


def _by_chunk(x: Array, plan: Plan) -> Array:
    """`[batch, time, heads]` as float32 `[batch, heads, chunks, 64]`."""
    x = x.astype(jnp.float32).reshape(plan.batch, plan.chunks, CHUNK, plan.heads)
    return x.transpose(0, 3, 1, 2)


def _by_token(x: Array) -> Array:
    """The reverse of `_by_chunk`."""
    return x.transpose(0, 2, 3, 1).reshape(x.shape[0], -1, x.shape[1])
