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

Where a token has n writes, i and j of A, B and R are the n C writes of the chunk, those of P's queries its C tokens, and
G the decays of the tokens: nothing that belongs to a token is repeated for its writes.

Source: arXiv 2406.06484 section 3.2 and arXiv 2412.06464 section 3.3, for an erase key of its own, gates per channel and
several writes a token.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float

from delta_jax.ops.chunks import (
    Inputs,
    Options,
    carry,
    enter,
    join,
    leave,
    prepare,
    query_scores,
    through_chunk,
    visible,
)
from delta_jax.ops.decay import boundary_gate_gradient, decayed_scores_backward, merged
from delta_jax.ops.precision import accumulator_dtype, constant, einsum, masked, transposed, varying_like

# In writes. Measured on two CPU cores: the chunk with the least work for heads of 128 and for heads of at most 16, and the
# group that stays in the cache.
DEFAULT_CHUNK = 32
SMALL_HEADS_CHUNK = 16
WRITES_PER_GROUP = 128


def forward(
    q: Float[Array, "batch time key_heads key"],
    k: Float[Array, "batch time *writes key_heads key"],
    v: Float[Array, "batch time *writes heads value"],
    beta: Float[Array, "batch time *writes heads"] | None,
    g: Float[Array, "batch time heads"] | Float[Array, "batch time heads key"] | None,
    erase: Float[Array, "batch time *writes erase_heads key"] | None,
    initial_state: Float[Array, "batch heads key value"] | None,
    reset: Bool[Array, "batch time"] | None,
    *,
    scale: float,
    chunk_size: int | None,
    erases: bool,
) -> tuple[Float[Array, "batch time heads value"], Float[Array, "batch heads key value"], Array]:
    """The chunkwise form over all tokens; arguments as in `delta_jax.ops.recurrence.recurrent`.

    Returns:
      The outputs, the final state, and for the backward the states before every group of chunks.
    """
    arrays = Inputs(q, k, v, beta, g, erase, reset)
    options = _options(arrays, scale, chunk_size, erases)
    inputs = _in_sets(arrays, options)
    if initial_state is None:
        initial_state = jnp.zeros((v.shape[0], v.shape[-2], k.shape[-1], v.shape[-1]), accumulator_dtype(v.dtype))

    def body(state: Array, index: Array) -> tuple[Array, tuple[Array, Array]]:
        factors = prepare(inputs, index, options)
        done = carry(factors, state, options)
        own = einsum("...ij,...jv->...iv", query_scores(factors), jnp.stack(done.writes))
        o = (jnp.stack(done.reads) + own)[..., None, :, :]
        return done.end, (leave(o)[:, :, 0].astype(v.dtype), state)

    state = varying_like(initial_state.astype(accumulator_dtype(v.dtype)), *inputs)
    state, (o, states) = jax.lax.scan(body, state, jnp.arange(_groups(inputs, options)))
    return join(o)[:, : v.shape[1]], state, states


def backward(
    q: Float[Array, "batch time key_heads key"],
    k: Float[Array, "batch time *writes key_heads key"],
    v: Float[Array, "batch time *writes heads value"],
    beta: Float[Array, "batch time *writes heads"] | None,
    g: Float[Array, "batch time heads"] | Float[Array, "batch time heads key"] | None,
    erase: Float[Array, "batch time *writes erase_heads key"] | None,
    initial_state: Float[Array, "batch heads key value"] | None,
    reset: Bool[Array, "batch time"] | None,
    states: Float[Array, "groups batch heads key value"],
    d_o: Float[Array, "batch time heads value"],
    d_state: Float[Array, "batch heads key value"],
    *,
    scale: float,
    chunk_size: int | None,
    erases: bool,
) -> tuple[Any, ...]:
    """Cotangents of the first six arguments of `forward` and, always, of the initial state, in its results' dtype.

    `states` is what `forward` keeps, `d_o` and `d_state` are the cotangents of its results.
    """
    del initial_state
    arrays = Inputs(q, k, v, beta, g, erase, reset)
    options = _options(arrays, scale, chunk_size, erases)
    inputs = _in_sets(arrays, options)
    padding = inputs.v.shape[1] - v.shape[1]
    d_o = jnp.pad(d_o, ((0, 0), (0, padding), (0, 0), (0, 0))) if padding else d_o

    def body(d_state: Array, group: tuple[Array, Array]) -> tuple[Array, Inputs]:
        return _group_backward(inputs, *group, d_o, d_state, options)

    d_state, d_inputs = jax.lax.scan(body, d_state, (jnp.arange(states.shape[0]), states), reverse=True)
    *d_arrays, _ = jax.tree.map(
        lambda d, x: join(d)[:, : v.shape[1]].reshape(x.shape).astype(x.dtype), d_inputs, arrays._replace(reset=None)
    )
    return *d_arrays, d_state


def _options(arrays: Inputs, scale: float, chunk_size: int | None, erases: bool) -> Options:
    """How many tokens a chunk has and how many chunks a group."""
    q, k = arrays.q, arrays.k
    writes = k.shape[2] if k.ndim > q.ndim else 1
    default = DEFAULT_CHUNK if k.shape[-1] > 16 else SMALL_HEADS_CHUNK
    chunk = chunk_size or power_of_two(max(default // writes, 1))
    chunks = -(-q.shape[1] // chunk)
    group = power_of_two(WRITES_PER_GROUP // (chunk * writes))
    if isinstance(chunks, int):  # else a symbolic dimension of `jax.export`, while a group's chunks are unrolled
        group = -(-chunks // -(-chunks // group))
    return Options(scale, chunk, group, writes, erases)


def _groups(inputs: Inputs, options: Options) -> int:
    return inputs.v.shape[1] // (options.chunk * options.group)


def _in_sets(arrays: Inputs, options: Options) -> Inputs:
    """The op's arrays as `[batch, time, sets, heads, dim]`, their tokens filled up to whole groups."""
    q, k, v, beta, g, erase, reset = arrays
    batch, time = q.shape[:2]
    heads, writes = v.shape[-2], options.writes
    tokens = options.group * options.chunk
    padding = -(-time // tokens) * tokens - time  # of a symbolic time too it is clear that whole groups result

    def sets(x: Array, *shape: int) -> Array:
        x = x.reshape(batch, time, *shape)
        return jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0), (0, 0))) if padding else x

    return Inputs(
        sets(q, 1, *q.shape[-2:]),
        sets(k, writes, *k.shape[-2:]),
        sets(v, writes, heads, v.shape[-1]),
        None if beta is None else sets(beta, writes, heads, 1),
        None if g is None else sets(g, 1, heads, -1),
        None if erase is None else sets(erase, writes, -1, k.shape[-1]),
        None if reset is None else sets(reset, 1, 1, 1),
    )


def power_of_two(limit: int) -> int:
    """The largest power of two up to `limit`, at least 1."""
    return 1 << max(limit.bit_length() - 1, 0)


def _group_backward(
    inputs: Inputs, index: Array, state: Array, d_o: Array, d_state: Array, options: Options
) -> tuple[Array, Inputs]:
    """Cotangents of a group's first state and inputs, from those of its outputs and last state; last chunk first."""
    factors = prepare(inputs, index, options)
    done = carry(factors, state, options)

    def parted(x: Array) -> Array:
        return x.reshape(*x.shape[:-2], -1, options.chunk, x.shape[-1])

    d_o = enter(d_o[:, :, None], index, options, d_state.dtype)[..., 0, :, :]
    beta, decay, writes = factors.beta, factors.decay, options.writes
    # With a sign on the erase rows the state's cotangent is one product with [d_new; d_o].
    signs = np.repeat([-1.0, 1.0], [writes * options.chunk * options.erases, options.chunk])
    sign = constant(signs[:, None], d_o)
    read_keys = transposed(factors.reads * sign)
    inverse = None if factors.inverse is None else transposed(factors.inverse)
    from_outputs = einsum("...ij,...jv->...iv", transposed(query_scores(factors)), d_o)
    d_rights, d_reads, d_writes, d_wholes = [], [], [], []
    for n in reversed(range(options.group)):
        d_right = from_outputs[n] + einsum("bhjk,bhkv->bhjv", factors.writes[n], d_state)
        if inverse is not None:
            d_right = einsum("bhij,bhjv->bhiv", inverse[n], d_right)
        d_read = d_o[n]
        if options.erases:
            d_new = d_right if beta is None else beta[n] * d_right
            d_read = jnp.concatenate([d_new, d_read], -2)
        d_rights.append(d_right)
        d_reads.append(einsum("bhiv,bhkv->bhik", d_read, done.states[n]))
        d_writes.append(einsum("bhjv,bhkv->bhjk", done.writes[n], d_state))
        d_wholes.append(jnp.sum(done.states[n] * d_state, -1)[..., None, :])
        d_state = through_chunk(d_state, decay, n) + einsum("bhki,bhiv->bhkv", read_keys[n], d_read)
    d_right, d_read, d_write, d_whole = (jnp.stack(x[::-1]) for x in (d_rights, d_reads, d_writes, d_wholes))
    d_read = (d_read * sign).reshape(factors.rows.shape)
    d_write = d_write.reshape(factors.k.shape)

    # The writes solve (I + A) R = b B, so d_A = -d_right R^T.
    d_products = jnp.concatenate([-d_right, d_o], -2) if options.erases else d_o
    d_products = einsum("...iv,...jv->...ij", d_products, jnp.stack(done.writes))
    d_scores = masked(visible(options), d_products.reshape(factors.scores.shape))
    d_v, d_beta = d_right, None
    if beta is not None:
        d_v, d_beta = beta * d_right, jnp.sum(d_right * jnp.stack(done.news), -1, keepdims=True)
        if options.erases:
            d_a = d_scores[..., :-1, :, :, :]
            d_beta = d_beta + jnp.sum(d_a * factors.scores[..., :-1, :, :, :], (-2, -1)).reshape(d_beta.shape)
            d_a = beta.reshape(*d_a.shape[:-2], 1, 1) * d_a
            d_scores = jnp.concatenate([d_a, d_scores[..., -1:, :, :, :]], -4)
    d_rows, d_k, d_g = decayed_scores_backward(d_scores, factors.scores, factors.rows, factors.k, decay)
    if decay is None:
        d_rows, d_k = d_rows + d_read, d_k + d_write
    else:
        d_rows, d_k = d_rows + d_read * decay.start[..., None, :, :], d_k + d_write * decay.end[..., None, :, :]
    if inputs.g is not None and decay is not None and d_g is not None:
        terms = [factors.reads * merged(d_read), factors.writes * merged(d_write), decay.whole * d_whole]
        if inputs.g.shape[-1] == 1:
            terms = [jnp.sum(x, -1, keepdims=True) for x in terms]
        start, end = (jnp.sum(parted(x), -3) for x in terms[:2])
        d_g = leave((d_g + boundary_gate_gradient(start, end, terms[2]))[..., None, :, :])

    key_heads, d_erase = inputs.k.shape[3], None
    if options.erases and inputs.erase is None:
        d_k = d_k + d_rows[..., :-1, :, :]
    elif inputs.erase is not None:
        d_erase = leave(d_rows[..., :-1, :, :], inputs.erase.shape[3])

    return d_state, Inputs(
        q=leave(options.scale * d_rows[..., -1:, :, :], key_heads),
        k=leave(d_k, key_heads),
        v=leave(parted(d_v)),
        beta=None if d_beta is None else leave(parted(d_beta)),
        g=None if inputs.g is None else d_g,
        erase=d_erase,
        reset=None,
    )
