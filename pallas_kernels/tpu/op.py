"""The general delta rule on a TPU: outputs and cotangents by the kernels, and the layouts they want."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.batching import joins_batch
from pallas_kernels.inputs import Inputs, base_two, gate_gradient, padded, suffix_sums, with_resets
from pallas_kernels.tpu.backward import backward as backward_kernel
from pallas_kernels.tpu.backward import backward_bytes
from pallas_kernels.tpu.forward import Kept, forward_bytes
from pallas_kernels.tpu.forward import forward as forward_kernel
from pallas_kernels.tpu.plan import FEW_HEADS, MAX_GROUP, MAX_HEADS, WIDE_HEADS, Plan, head_counts, repeated, vmem_bytes
from pallas_kernels.tpu.products import TILE
from pallas_kernels.tpu.tile import Tokens


def forward(
    arrays: Inputs,
    initial_state: Array | None,
    reset: Array | None,
    *,
    scale: float,
    erases: bool,
    keep: bool,
) -> tuple[Array, Array, Kept | None]:
    """Outputs over all tokens, `[batch, time, heads, value]`, final states, `[batch, heads, key, value]`, and what is kept.

    The arrays are those of the op with one write a token, `erase=None` erases with `k` unless `erases` is false, `reset`
    `[batch, time]` is true where a segment starts; `plan.unsupported` tells what the kernels cannot take. Without
    `keep` nothing is kept for `backward`.
    """
    inputs = _inputs(arrays, reset, erases)

    def run(inputs: Inputs, initial_state: Array | None) -> tuple[Array, Array, Kept | None]:
        plan = plan_of(inputs, scale, erases, forward_bytes)
        state = None if initial_state is None else initial_state.astype(jnp.float32)
        o, state, kept = forward_kernel(plan, tokens_of(inputs, plan), state, keep)
        return o.reshape(inputs.v.shape), state, kept

    o, state, kept = joins_batch(run)(inputs, initial_state)
    return o[:, : arrays.v.shape[1]], state, kept


def backward(
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
    inputs, pull = jax.vjp(lambda arrays: _inputs(arrays, reset, erases), arrays)
    d_o = jnp.pad(d_o, ((0, 0), (0, inputs.v.shape[1] - arrays.v.shape[1]), (0, 0), (0, 0)))
    d_inputs, d_state = joins_batch(functools.partial(_cotangents, scale, erases))(inputs, kept, d_o, d_state)
    (d_arrays,) = pull(d_inputs)
    return d_arrays, d_state


def _inputs(arrays: Inputs, reset: Array | None, erases: bool) -> Inputs:
    """The op's arrays as the kernels take them: few value heads a key head, resets in the gates, whole grid steps."""
    inputs = repeated(arrays, MAX_HEADS)
    inputs = inputs._replace(g=with_resets(inputs.g, reset, inputs.v))
    return padded(inputs, -inputs.v.shape[1] % (_tiles_a_step(inputs, erases) * TILE))


def _tiles_a_step(inputs: Inputs, erases: bool) -> int:
    """As many as leave the backward, which needs more memory, the most heads; padding does not change the number."""
    tiles = -(-inputs.v.shape[1] // TILE)
    even = {-(-tiles // -(-tiles // most)) for most in range(1, MAX_GROUP + 1)}
    plans = [plan for group in even for plan in _plans(inputs, 1.0, erases, group)]
    fitting = [(plan.heads, plan.group) for plan in plans if backward_bytes(plan) <= vmem_bytes()]
    return max(fitting, default=(0, 1))[1]


def plan_of(inputs: Inputs, scale: float, erases: bool, needs: Callable[[Plan], int]) -> Plan:
    """How a call with these arrays is cut for a kernel that `needs` so many bytes: into steps of the most heads that fit."""
    plans = _plans(inputs, scale, erases, _tiles_a_step(inputs, erases))
    return max((p for p in plans if needs(p) <= vmem_bytes()), default=plans[0], key=lambda plan: plan.heads)


def _plans(inputs: Inputs, scale: float, erases: bool, group: int) -> list[Plan]:
    """Those with so many tiles a grid step, the fewest heads first."""
    counts = head_counts(inputs.k.shape[2], inputs.v.shape[2], inputs.k.shape[3], inputs.v.shape[3])
    most = MAX_HEADS if any(FEW_HEADS <= n <= MAX_HEADS for n in counts) else WIDE_HEADS
    return [_plan_of(inputs, scale, erases, n, group) for n in counts if n <= most or n == counts[0]]


def _plan_of(inputs: Inputs, scale: float, erases: bool, here: int, group: int) -> Plan:
    batch, time, heads, value = inputs.v.shape
    key_heads, key = inputs.k.shape[2:]
    return Plan(
        batch=batch,
        key_heads=here * key_heads // heads,
        heads=here,
        programs=heads // here,
        group=group,
        groups=-(-time // (group * TILE)),
        key=key,
        value=value,
        gate=inputs.gate,
        erase_heads=0 if inputs.erase is None else here * inputs.erase.shape[2] // heads,
        erases=erases,
        exact=inputs.v.dtype == jnp.float32,
        scale=scale,
    )


def _cotangents(
    scale: float,
    erases: bool,
    inputs: Inputs,
    kept: Kept,
    d_o: Array,
    d_state: Array,
) -> tuple[Inputs, Array]:
    """Cotangents of the inputs and, in float32, of the initial state."""
    plan = plan_of(inputs, scale, erases, backward_bytes)
    tokens = tokens_of(inputs, plan)
    d_tokens, d_state = backward_kernel(plan, tokens, kept, d_o.reshape(tokens.v.shape), d_state)
    flat = inputs._replace(beta=None, g=inputs.g if plan.gate == "channel" else None)
    d_flat = Inputs(d_tokens.q, d_tokens.k, d_tokens.v, None, d_tokens.g, d_tokens.erase)
    d_inputs = jax.tree.map(lambda d, x: d.reshape(x.shape).astype(x.dtype), d_flat, flat)
    d_beta, *terms = _heads_last(d_tokens.scalars, plan)
    if inputs.beta is not None:
        d_inputs = d_inputs._replace(beta=d_beta.reshape(inputs.beta.shape).astype(inputs.beta.dtype))
    if inputs.g is not None and plan.gate == "head":
        d_inputs = d_inputs._replace(
            g=gate_gradient(terms[0], terms[1], terms[2], terms[3], axis=2)
            .reshape(inputs.g.shape)
            .astype(inputs.g.dtype)
        )
    return d_inputs, d_state


def tokens_of(inputs: Inputs, plan: Plan) -> Tokens:
    """The arrays as the kernels read them: heads side by side on the lanes, token scalars with tokens on the lanes."""

    def flat(x: Array | None) -> Array | None:
        return None if x is None else x.reshape(*x.shape[:2], -1)

    beta = jnp.ones(inputs.v.shape[:3], jnp.float32) if inputs.beta is None else inputs.beta
    scalars = [_tokens_last(beta, plan)]
    if plan.gate == "head" and inputs.g is not None:
        gate = base_two(_tokens_last(inputs.g, plan))
        after = jnp.pad(gate[..., 1:], ((0, 0),) * 4 + ((0, 1),))
        scalars += [gate, jnp.exp2(jnp.cumsum(gate, -1)), jnp.exp2(suffix_sums(after))]
    return Tokens(
        q=flat(inputs.q),
        k=flat(inputs.k),
        v=flat(inputs.v),
        erase=flat(inputs.erase),
        g=flat(inputs.g) if plan.gate == "channel" else None,
        scalars=jnp.concatenate(scalars, 3),
    )


def _tokens_last(x: Array, plan: Plan) -> Array:
    """`[batch, time, all heads]` as float32 `[batch, programs, tiles, heads, 128]`."""
    x = x.astype(jnp.float32).reshape(plan.batch, plan.tiles, TILE, plan.programs, plan.heads)
    return x.transpose(0, 3, 1, 4, 2)


def _heads_last(x: Array, plan: Plan) -> Array:
    """`[batch, programs, tiles, kinds * heads, 128]` as `[kinds, batch, tiles, 128, all heads]`."""
    x = x.reshape(plan.batch, plan.programs, plan.tiles, -1, plan.heads, TILE)
    return x.transpose(3, 0, 2, 5, 1, 4).reshape(-1, plan.batch, plan.tiles, TILE, plan.programs * plan.heads)
