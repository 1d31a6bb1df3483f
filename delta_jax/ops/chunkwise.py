"""The delta rule chunk by chunk, forward and hand-written backward, in plain JAX.

Inside a chunk of C tokens that starts from state S (G the cumulative log decay, D_ij = exp(G_i - G_j), b = beta):

    A_ij = b_i sum_d e_i k_j D_ij   (i > j)          P_ij = scale sum_d q_i k_j D_ij   (i >= j)
    B = V - (exp(G) E) S                             what the state does not know yet
    R = (I + A)^-1 (b B)                             the writes, each corrected for the earlier ones
    O = scale (exp(G) Q) S + P R
    S' = exp(G_C) S + (exp(G_C - G) K)^T R

The factors of A, P and of the decays do not depend on the state and are computed for a group of chunks at once; three
products a chunk are left to the sequence. The backward keeps the state at the start of every group and recomputes the
rest, so memory is that of the inputs plus a small constant times T. Without an erase A = 0 and B = V.

Source: arXiv 2406.06484 section 3.2 and arXiv 2412.06464 section 3.3, for an erase key of its own and gates per channel.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Bool, Float

from delta_jax.ops.decay import (
    Decay,
    boundary_gate_gradient,
    chunk_decay,
    decayed_scores,
    decayed_scores_backward,
)
from delta_jax.ops.inverse import unit_lower_inverse
from delta_jax.ops.precision import accumulator_dtype, constant, einsum, masked, varying_like
from delta_jax.ops.recurrence import repeat_heads

TOKENS_PER_GROUP = 128


class Inputs(NamedTuple):
    """What the op is differentiated with respect to, `[batch, time, heads, ...]`; None where a member has none."""

    q: Array
    k: Array
    v: Array
    beta: Array | None
    g: Array | None
    erase: Array | None
    reset: Array | None  # not differentiated


class Options(NamedTuple):
    scale: float
    chunk: int
    group: int  # chunks computed at once
    erases: bool


class Factors(NamedTuple):
    """What a group of chunks needs besides the state, `[group, batch, heads, ...]`."""

    rows: Array  # the erase keys and the scaled queries, [..., rows, C, K]; the queries alone without an erase
    k: Array
    v: Array
    beta: Array | None
    decay: Decay | None
    scores: Array  # decayed scores of `rows` with the keys, [..., rows, C, C]
    inverse: Array | None  # (I + A)^-1, [..., C, C]
    reads: Array  # decayed rows that read the chunk's first state, [..., rows * C, K]
    writes: Array  # keys decayed to the chunk's end, [..., C, K]


def chunkwise(
    q: Float[Array, "batch time key_heads key"],
    k: Float[Array, "batch time key_heads key"],
    v: Float[Array, "batch time heads value"],
    beta: Float[Array, "batch time heads"] | None,
    g: Float[Array, "batch time heads"] | Float[Array, "batch time heads key"] | None,
    erase: Float[Array, "batch time erase_heads key"] | None,
    initial_state: Float[Array, "batch heads key value"] | None,
    reset: Bool[Array, "batch time"] | None,
    *,
    scale: float,
    chunk_size: int | None,
    erases: bool,
) -> tuple[Float[Array, "batch time heads value"], Float[Array, "batch heads key value"]]:
    """The chunkwise form over all tokens; arguments as checked by `delta_jax.ops.api`."""
    batch, time, heads, value = v.shape
    chunk = chunk_size or 32
    chunks = -(-time // chunk)
    groups = -(-chunks // max(1, TOKENS_PER_GROUP // chunk))
    options = Options(scale, chunk, -(-chunks // groups), erases)
    padding = groups * options.group * chunk - time

    def pad(x: Array) -> Array:
        return jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2)) if padding else x

    inputs = jax.tree.map(pad, Inputs(q, k, v, beta, g, erase, reset))
    if initial_state is None:
        initial_state = jnp.zeros((batch, heads, k.shape[-1], value), accumulator_dtype(v.dtype))
    o, state = _chunkwise(inputs, varying_like(initial_state, *inputs), options)
    return o[:, :time], state


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _chunkwise(inputs: Inputs, initial_state: Array, options: Options) -> tuple[Array, Array]:
    return _forward(inputs, initial_state, options)[0]


def _forward(
    inputs: Inputs, initial_state: Array, options: Options
) -> tuple[tuple[Array, Array], tuple[Inputs, Array, Array]]:
    def body(state: Array, index: Array) -> tuple[Array, tuple[Array, Array]]:
        factors = _prepare(inputs, index, options)
        end, _, _, writes, o = _run(factors, state, options)
        o = o + einsum("...ij,...jv->...iv", factors.scores[..., -1, :, :], writes)
        return end, (_leave(o).astype(inputs.v.dtype), state)

    groups = inputs.v.shape[1] // (options.chunk * options.group)
    state = initial_state.astype(accumulator_dtype(inputs.v.dtype))
    state, (o, states) = jax.lax.scan(body, state, jnp.arange(groups))
    return (_join(o), state), (inputs, initial_state, checkpoint_name(states, "delta_rule_states"))


def _backward(
    options: Options, residuals: tuple[Inputs, Array, Array], cotangents: tuple[Array, Array]
) -> tuple[Inputs, Array]:
    inputs, initial_state, states = residuals
    d_o, d_state = cotangents

    def body(d_state: Array, group: tuple[Array, Array]) -> tuple[Array, Inputs]:
        index, state = group
        factors = _prepare(inputs, index, options)
        return _group_backward(factors, state, _enter(d_o, index, options, d_state.dtype), d_state, inputs, options)

    d_state, d_inputs = jax.lax.scan(
        body, d_state, (jnp.arange(states.shape[0]), states), reverse=True
    )
    d_inputs = jax.tree.map(lambda d, x: _join(d).astype(x.dtype), d_inputs, inputs._replace(reset=None))
    return d_inputs, d_state.astype(initial_state.dtype)


_chunkwise.defvjp(_forward, _backward)


def _prepare(inputs: Inputs, index: Array, options: Options) -> Factors:
    """Everything of group `index` that does not depend on the state."""
    heads, dtype = inputs.v.shape[2], accumulator_dtype(inputs.v.dtype)
    enter = functools.partial(_enter, index=index, options=options, dtype=dtype, heads=heads)
    q, k, v = enter(inputs.q), enter(inputs.k), enter(inputs.v)
    beta, g = (None if x is None else enter(x) for x in (inputs.beta, inputs.g))
    decay = None
    if g is not None or inputs.reset is not None:
        g = jnp.zeros(v.shape[:-1], dtype) if g is None else g
        g = g[..., None] if g.ndim == 4 else g
        reset = None if inputs.reset is None else _enter(inputs.reset[..., None], index, options, jnp.bool_)
        decay = chunk_decay(g, reset)
    rows = [options.scale * q]
    if options.erases:
        rows.insert(0, k if inputs.erase is None else enter(inputs.erase))
    rows = jnp.stack(rows, -3)
    scores = decayed_scores(rows, k, decay)
    inverse = None
    if options.erases:
        a = scores[..., 0, :, :]
        inverse = unit_lower_inverse(a if beta is None else beta[..., None] * a)
    reads = rows if decay is None else rows * decay.start[..., None, :, :]
    reads = reads.reshape(*reads.shape[:-3], -1, reads.shape[-1])
    writes = k if decay is None else k * decay.end
    return Factors(rows, k, v, beta, decay, scores, inverse, reads, writes)


def _run(factors: Factors, state: Array, options: Options) -> tuple[Array, Array, Array, Array, Array]:
    """The sequential part over a group: final state; first state, B, R and the state's share of O of every chunk."""
    states, news, writes, outputs = [], [], [], []
    write_keys = _transposed(factors.writes)
    for n in range(options.group):
        states.append(state)
        read = einsum("bhik,bhkv->bhiv", factors.reads[n], state)
        new = factors.v[n]
        if options.erases:
            new = new - read[..., : options.chunk, :]
        write = new if factors.beta is None else factors.beta[n][..., None] * new
        if factors.inverse is not None:
            write = einsum("bhij,bhjv->bhiv", factors.inverse[n], write)
        state = _decayed(state, factors.decay, n) + einsum("bhkj,bhjv->bhkv", write_keys[n], write)
        news.append(new)
        writes.append(write)
        outputs.append(read[..., -options.chunk :, :])
    return state, *(jnp.stack(x) for x in (states, news, writes, outputs))


def _group_backward(
    factors: Factors, state: Array, d_o: Array, d_state: Array, inputs: Inputs, options: Options
) -> tuple[Array, Inputs]:
    """Cotangents of a group from those of its outputs and final state, last chunk first."""
    chunk, decay, beta = options.chunk, factors.decay, factors.beta
    _, states, news, writes, _ = _run(factors, state, options)
    # A sign on the erase rows lets the state's cotangent be one product with [d_new; d_o].
    sign = np.repeat([[-1.0], [1.0]], chunk, 0) if options.erases else np.ones((1, 1))
    read_keys = _transposed(factors.reads * constant(sign, d_o))
    inverse = None if factors.inverse is None else _transposed(factors.inverse)
    from_output = einsum("...ij,...jv->...iv", _transposed(factors.scores[..., -1, :, :]), d_o)
    d_ends, d_rhs, d_reads = [], [], []
    for n in reversed(range(options.group)):
        d_ends.append(d_state)
        d_right = from_output[n] + einsum("bhjk,bhkv->bhjv", factors.writes[n], d_state)
        if inverse is not None:
            d_right = einsum("bhij,bhjv->bhiv", inverse[n], d_right)
        d_new = d_right if beta is None else beta[n][..., None] * d_right
        d_read = jnp.concatenate([d_new, d_o[n]], -2) if options.erases else d_o[n]
        d_state = _decayed(d_state, decay, n) + einsum("bhki,bhiv->bhkv", read_keys[n], d_read)
        d_rhs.append(d_right)
        d_reads.append(d_read)
    d_ends, d_rhs, d_reads = (jnp.stack(x[::-1]) for x in (d_ends, d_rhs, d_reads))

    d_scores = d_o if not options.erases else jnp.concatenate([-d_rhs, d_o], -2)
    d_scores = einsum("...iv,...jv->...ij", d_scores, writes)
    d_scores = masked(_visible(options), d_scores.reshape(factors.scores.shape))
    d_v = d_rhs if beta is None else beta[..., None] * d_rhs
    d_beta = None
    if beta is not None:
        d_beta = jnp.sum(d_rhs * news, -1)
        if options.erases:
            d_a = d_scores[..., 0, :, :]
            d_beta = d_beta + jnp.sum(d_a * factors.scores[..., 0, :, :], -1)
            d_scores = jnp.stack([beta[..., None] * d_a, d_scores[..., 1, :, :]], -3)
    d_rows, d_k, d_g = decayed_scores_backward(d_scores, factors.scores, factors.rows, factors.k, decay)

    d_read_keys = constant(sign, d_o) * einsum("...iv,...kv->...ik", d_reads, states)
    d_read_keys = d_read_keys.reshape(factors.rows.shape)
    d_write_keys = einsum("...jv,...kv->...jk", writes, d_ends)
    if decay is None:
        d_rows, d_k = d_rows + d_read_keys, d_k + d_write_keys
    else:
        d_rows = d_rows + d_read_keys * decay.start[..., None, :, :]
        d_k = d_k + d_write_keys * decay.end
    if inputs.g is None:
        d_g = None
    else:
        terms = (
            jnp.sum(factors.reads.reshape(factors.rows.shape) * d_read_keys, -3),
            factors.writes * d_write_keys,
            jnp.sum(jnp.swapaxes(decay.whole, -1, -2) * states * d_ends, -1)[..., None, :],
        )
        if d_g.shape[-1] == 1:
            terms = tuple(jnp.sum(x, -1, keepdims=True) for x in terms)
        d_g = d_g + boundary_gate_gradient(*terms)

    d_erase = None
    if options.erases and inputs.erase is None:
        d_k = d_k + d_rows[..., 0, :, :]
    elif options.erases:
        d_erase = _leave(d_rows[..., 0, :, :], inputs.erase.shape[2])
    key_heads = inputs.k.shape[2]
    return d_state, Inputs(
        q=_leave(options.scale * d_rows[..., -1, :, :], key_heads),
        k=_leave(d_k, key_heads),
        v=_leave(d_v),
        beta=None if d_beta is None else _leave(d_beta[..., None])[..., 0],
        g=None if d_g is None else _leave(d_g).reshape(*d_g.shape[1:2], -1, *inputs.g.shape[2:]),
        erase=d_erase,
        reset=None,
    )


def _visible(options: Options) -> np.ndarray:
    """Which scores count: those with earlier keys for erasing, with the own key too for the query."""
    lower = np.tril(np.ones((options.chunk,) * 2, bool))
    return np.stack([np.tril(lower, -1), lower]) if options.erases else lower[None]


def _decayed(state: Array, decay: Decay | None, n: int) -> Array:
    return state if decay is None else jnp.swapaxes(decay.whole[n], -1, -2) * state


def _transposed(x: Array) -> Array:
    """A transpose that is written out: XLA's CPU products are several times slower on a folded one."""
    return jax.lax.optimization_barrier(jnp.swapaxes(x, -1, -2))


def _enter(x: Array, index: Array, options: Options, dtype: jnp.dtype, heads: int | None = None) -> Array:
    """Group `index` of `[batch, time, heads, ...]` as `[group, batch, heads, chunk, ...]`, key heads repeated."""
    tokens = options.group * options.chunk
    x = jax.lax.dynamic_slice_in_dim(x, index * tokens, tokens, 1).astype(dtype)
    if heads is not None and x.ndim == 4:
        x = repeat_heads(x, heads)
    x = x.reshape(x.shape[0], options.group, options.chunk, *x.shape[2:])
    return jnp.moveaxis(jnp.moveaxis(x, 1, 0), 3, 2)


def _leave(x: Array, key_heads: int | None = None) -> Array:
    """The reverse of `_enter` on `[group, batch, heads, chunk, dim]`: `[batch, tokens, heads, dim]`."""
    x = jnp.moveaxis(jnp.moveaxis(x, 2, 3), 0, 1)
    x = x.reshape(x.shape[0], -1, *x.shape[3:])
    if key_heads is not None and key_heads != x.shape[2]:
        x = x.reshape(*x.shape[:2], key_heads, -1, x.shape[-1]).sum(3)
    return x


def _join(x: Array) -> Array:
    """`[groups, batch, tokens, ...]` as `[batch, time, ...]`."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])
