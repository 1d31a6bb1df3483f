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

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Bool, Float

from delta_jax.ops.chunks import Inputs, Options, carry, enter, join, leave, prepare, through_chunk, visible
from delta_jax.ops.decay import boundary_gate_gradient, decayed_scores_backward
from delta_jax.ops.precision import accumulator_dtype, constant, einsum, masked, transposed, varying_like

# Measured on two CPU cores with heads of 128: the chunk with the least work, the group that stays in the cache.
DEFAULT_CHUNK = 32
TOKENS_PER_GROUP = 128


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
    """The chunkwise form over all tokens; arguments as in `delta_jax.ops.recurrence.recurrent`."""
    batch, time, heads, value = v.shape
    chunk = chunk_size or DEFAULT_CHUNK
    chunks = -(-time // chunk)
    groups = -(-chunks * chunk // TOKENS_PER_GROUP)
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
        factors = prepare(inputs, index, options)
        done = carry(factors, state, options)
        own = einsum("...ij,...jv->...iv", factors.scores[..., -1, :, :], jnp.stack(done.writes))
        return done.end, (leave(jnp.stack(done.reads) + own).astype(inputs.v.dtype), state)

    groups = inputs.v.shape[1] // (options.chunk * options.group)
    state = initial_state.astype(accumulator_dtype(inputs.v.dtype))
    state, (o, states) = jax.lax.scan(body, state, jnp.arange(groups))
    return (join(o), state), (inputs, initial_state, checkpoint_name(states, "delta_rule_states"))


def _backward(
    options: Options, residuals: tuple[Inputs, Array, Array], cotangents: tuple[Array, Array]
) -> tuple[Inputs, Array]:
    inputs, initial_state, states = residuals
    d_o, d_state = cotangents

    def body(d_state: Array, group: tuple[Array, Array]) -> tuple[Array, Inputs]:
        return _group_backward(inputs, *group, d_o, d_state, options)

    d_state, d_inputs = jax.lax.scan(body, d_state, (jnp.arange(states.shape[0]), states), reverse=True)
    d_inputs = jax.tree.map(lambda d, x: join(d).astype(x.dtype), d_inputs, inputs._replace(reset=None))
    return d_inputs, d_state.astype(initial_state.dtype)


_chunkwise.defvjp(_forward, _backward)


def _group_backward(
    inputs: Inputs, index: Array, state: Array, d_o: Array, d_state: Array, options: Options
) -> tuple[Array, Inputs]:
    """Cotangents of a group's first state and inputs, from those of its outputs and last state; last chunk first."""
    factors = prepare(inputs, index, options)
    done = carry(factors, state, options)
    d_o = enter(d_o, index, options, d_state.dtype)
    beta, decay = factors.beta, factors.decay
    # With a sign on the erase rows the state's cotangent is one product with [d_new; d_o].
    sign = constant(np.repeat([[-1.0], [1.0]], options.chunk, 0) if options.erases else np.ones((1, 1)), d_o)
    read_keys = transposed(factors.reads * sign)
    inverse = None if factors.inverse is None else transposed(factors.inverse)
    from_outputs = einsum("...ij,...jv->...iv", transposed(factors.scores[..., -1, :, :]), d_o)
    d_rights, d_reads, d_writes, d_wholes = [], [], [], []
    for n in reversed(range(options.group)):
        d_right = from_outputs[n] + einsum("bhjk,bhkv->bhjv", factors.writes[n], d_state)
        if inverse is not None:
            d_right = einsum("bhij,bhjv->bhiv", inverse[n], d_right)
        d_read = d_o[n]
        if options.erases:
            d_new = d_right if beta is None else beta[n][..., None] * d_right
            d_read = jnp.concatenate([d_new, d_read], -2)
        d_rights.append(d_right)
        d_reads.append(einsum("bhiv,bhkv->bhik", d_read, done.states[n]))
        d_writes.append(einsum("bhjv,bhkv->bhjk", done.writes[n], d_state))
        d_wholes.append(jnp.sum(done.states[n] * d_state, -1)[..., None, :])
        d_state = through_chunk(d_state, decay, n) + einsum("bhki,bhiv->bhkv", read_keys[n], d_read)
    d_right, d_read, d_write, d_whole = (jnp.stack(x[::-1]) for x in (d_rights, d_reads, d_writes, d_wholes))
    d_read = (d_read * sign).reshape(factors.rows.shape)

    # The writes solve (I + A) R = b B, so d_A = -d_right R^T.
    d_products = jnp.concatenate([-d_right, d_o], -2) if options.erases else d_o
    d_products = einsum("...iv,...jv->...ij", d_products, jnp.stack(done.writes))
    d_scores = masked(visible(options), d_products.reshape(factors.scores.shape))
    d_v, d_beta = d_right, None
    if beta is not None:
        d_v, d_beta = beta[..., None] * d_right, jnp.sum(d_right * jnp.stack(done.news), -1)
        if options.erases:
            d_beta = d_beta + jnp.sum(d_scores[..., 0, :, :] * factors.scores[..., 0, :, :], -1)
            d_a = beta[..., None] * d_scores[..., 0, :, :]
            d_scores = jnp.concatenate([d_a[..., None, :, :], d_scores[..., 1:, :, :]], -3)
    d_rows, d_k, d_g = decayed_scores_backward(d_scores, factors.scores, factors.rows, factors.k, decay)
    if decay is None:
        d_rows, d_k = d_rows + d_read, d_k + d_write
    else:
        d_rows, d_k = d_rows + d_read * decay.start[..., None, :, :], d_k + d_write * decay.end
    if inputs.g is not None and decay is not None and d_g is not None:
        start = factors.reads * d_read.reshape(factors.reads.shape)
        terms = [start, factors.writes * d_write, decay.whole * d_whole]
        if inputs.g.ndim == 3:
            terms = [jnp.sum(x, -1, keepdims=True) for x in terms]
        terms[0] = jnp.sum(terms[0].reshape(*factors.rows.shape[:-1], -1), -3)
        d_g = leave(d_g + boundary_gate_gradient(*terms))
        d_g = d_g.reshape(*d_g.shape[:2], *inputs.g.shape[2:])

    key_heads, d_erase = inputs.k.shape[2], None
    if options.erases and inputs.erase is None:
        d_k = d_k + d_rows[..., 0, :, :]
    elif inputs.erase is not None:
        d_erase = leave(d_rows[..., 0, :, :], inputs.erase.shape[2])
    return d_state, Inputs(
        q=leave(options.scale * d_rows[..., -1, :, :], key_heads),
        k=leave(d_k, key_heads),
        v=leave(d_v),
        beta=None if d_beta is None else leave(d_beta[..., None])[..., 0],
        g=None if inputs.g is None else d_g,
        erase=d_erase,
        reset=None,
    )
