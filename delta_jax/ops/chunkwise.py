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

There are two ways through the sequence. A CPU has groups of a few short chunks, which stay in its cache, and takes chunk
after chunk. On an accelerator, which starts many kernels more slowly than it multiplies, chunks are longer and a group is as
many as memory allows: what the chunks do to a state is made of all at once, by which the states before all of them are known
(`delta_jax.ops.transitions`), and then all else of all chunks is done at once. The backward keeps the state before every
second chunk, from which one product gives the others.

Source: arXiv 2406.06484 section 3.2 and arXiv 2412.06464 section 3.3, for an erase key of its own, gates per channel and
several writes a token.
"""

from types import EllipsisType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from delta_jax.ops import device
from delta_jax.ops.arrays import Arrays, Options
from delta_jax.ops.chunks import (
    Blocking,
    Factors,
    Pass,
    carry,
    enter,
    join,
    leave,
    meet,
    prepare,
    query_scores,
    through_chunk,
    visible,
)
from delta_jax.ops.decay import boundary_gate_gradient, decayed_scores_backward, merged
from delta_jax.ops.precision import accumulator_dtype, constant, einsum, masked, transposed, varying_like
from delta_jax.ops.transitions import Maps, Through, maps_of, states_between

# In writes. Measured on two CPU cores: the chunk with the least work for heads of 128 and for heads of at most 16, and the
# group that stays in the cache.
DEFAULT_CHUNK = 32
SMALL_HEADS_CHUNK = 16
WRITES_PER_GROUP = 128
# On accelerators. In writes: twice as many are half as many steps and four times the work of the inverse, which a TPU does
# anyway, as its registers are 128 wide. In bytes: keys, values, scores and states of all chunks of a group.
PARALLEL_CHUNK, TPU_CHUNK = 64, 128
BYTES_PER_GROUP = 2**29


def forward(
    arrays: Arrays, options: Options, keep: bool, *, through: Through | None = None
) -> tuple[Float[Array, "batch time heads value"], Float[Array, "batch heads key value"], Array]:
    """The chunkwise form over all tokens.

    Args:
      arrays: the inputs.
      options: what is static about them.
      keep: whether `backward` follows.
      through: how the state passes through the chunks of a group where all else of them is done at once, as accelerators
        like it; None is one chunk after the other.

    Returns:
      The outputs, the final state, and for the backward states every so many chunks, which whoever does not keep them need
      not compute.
    """
    del keep
    k, v, initial = arrays.k, arrays.v, arrays.initial_state
    blocking = _blocking(arrays, options, through is not None)
    inputs = _in_sets(arrays, blocking)
    if initial is None:
        initial = jnp.zeros((v.shape[0], v.shape[-2], k.shape[-1], v.shape[-1]), accumulator_dtype(v.dtype))

    def body(state: Array, index: Array) -> tuple[Array, tuple[Array, Array]]:
        factors = prepare(inputs, index, blocking)
        done = _at_once(factors, state, blocking, through) if through else carry(factors, state, blocking)
        own = einsum("...ij,...jv->...iv", query_scores(factors), done.writes, to=blocking.to)
        o = done.reads + own
        end = _admitting(done.end, o) if through else done.end
        return end, (leave(o[..., None, :, :])[:, :, 0].astype(v.dtype), done.states[::2] if through else state)

    state = varying_like(initial.astype(accumulator_dtype(v.dtype)), *inputs)
    state, (o, states) = jax.lax.scan(body, state, jnp.arange(_groups(inputs, blocking)))
    return join(o)[:, : v.shape[1]], state, states


def backward(
    arrays: Arrays,
    options: Options,
    states: Float[Array, "groups *chunks batch heads key value"],
    d_o: Float[Array, "batch time heads value"],
    d_state: Float[Array, "batch heads key value"],
    *,
    through: Through | None = None,
) -> tuple[Arrays, Float[Array, "batch heads key value"]]:
    """Cotangents of the arrays but the initial state, and of that one by itself, in its results' dtype.

    `states` is what `forward` keeps, `d_o` and `d_state` are the cotangents of its results.
    """
    blocking, time = _blocking(arrays, options, through is not None), arrays.v.shape[1]
    inputs = _in_sets(arrays, blocking)
    padding = inputs.v.shape[1] - time
    d_o = jnp.pad(d_o, ((0, 0), (0, padding), (0, 0), (0, 0))) if padding else d_o

    def body(d_state: Array, group: tuple[Array, Array]) -> tuple[Array, Arrays]:
        return _group_backward(inputs, *group, d_o, d_state, blocking, through)

    d_state, d_inputs = jax.lax.scan(body, d_state, (jnp.arange(states.shape[0]), states), reverse=True)
    like = arrays._replace(initial_state=None, reset=None)
    return jax.tree.map(lambda d, x: join(d)[:, :time].reshape(x.shape).astype(x.dtype), d_inputs, like), d_state


def _blocking(arrays: Arrays, options: Options, parallel: bool) -> Blocking:
    """How many tokens a chunk has and how many chunks a group."""
    writes, dtype = arrays.writes, arrays.v.dtype
    if parallel:
        default = TPU_CHUNK if device.platform() == "tpu" else PARALLEL_CHUNK
    else:
        default = DEFAULT_CHUNK if arrays.k.shape[-1] > 16 else SMALL_HEADS_CHUNK
    chunk = options.chunk_size or power_of_two(max(default // writes, 1))
    chunks = -(-arrays.q.shape[1] // chunk)
    group = _parallel_group(arrays, chunk) if parallel else power_of_two(WRITES_PER_GROUP // (chunk * writes))
    if not isinstance(chunks, int):  # a symbolic dimension of `jax.export`, while the chunks of a group are counted
        group = min(group, 8)
    else:
        least = -(-chunks // group)
        if parallel:  # up to twice as many groups where they are filled up with fewer tokens
            least = min(range(least, 2 * least), key=lambda groups: groups * -(-chunks // groups))
        group = -(-chunks // least)
    to = dtype if parallel else accumulator_dtype(dtype)
    return Blocking(options.scale, chunk, group, writes, options.erases, to)


def _parallel_group(arrays: Arrays, chunk: int) -> int:
    """How many chunks have no more than `BYTES_PER_GROUP` in keys, values, scores and states."""
    batch, heads, key, value = arrays.q.shape[0], *arrays.v.shape[-2:-1], arrays.k.shape[-1], arrays.v.shape[-1]
    rows = chunk * arrays.writes
    numbers = 4 * rows * (key + value) + 3 * rows * rows + 3 * key * (key + value)
    size = accumulator_dtype(arrays.v.dtype).itemsize * heads * numbers
    # A symbolic batch, of `jax.export`, counts as one.
    return max(1, BYTES_PER_GROUP // (size * (batch if isinstance(batch, int) else 1)))


def _at_once(factors: Factors, state: Array, blocking: Blocking, through: Through) -> Pass:
    """What `carry` gives, of all chunks of a group at once."""
    states, end = through(maps_of(factors, blocking), state, blocking.careful)
    return Pass(end, states, *meet(factors, states, blocking))


def _groups(inputs: Arrays, blocking: Blocking) -> int:
    return inputs.v.shape[1] // (blocking.chunk * blocking.group)


def _in_sets(arrays: Arrays, blocking: Blocking) -> Arrays:
    """The op's arrays as `[batch, time, sets, heads, dim]`, their tokens filled up to whole groups."""
    q, k, v, beta, g, erase, _, reset = arrays
    batch, time = q.shape[:2]
    heads, writes = v.shape[-2], blocking.writes
    tokens = blocking.group * blocking.chunk
    padding = -(-time // tokens) * tokens - time  # of a symbolic time too it is clear that whole groups result

    def sets(x: Array, *shape: int) -> Array:
        x = x.reshape(batch, time, *shape)
        return jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0), (0, 0))) if padding else x

    return Arrays(
        sets(q, 1, *q.shape[-2:]),
        sets(k, writes, *k.shape[-2:]),
        sets(v, writes, heads, v.shape[-1]),
        None if beta is None else sets(beta, writes, heads, 1),
        None if g is None else sets(g, 1, heads, -1),
        None if erase is None else sets(erase, writes, -1, k.shape[-1]),
        None,
        None if reset is None else sets(reset, 1, 1, 1),
    )


def power_of_two(limit: int) -> int:
    """The largest power of two up to `limit`, at least 1."""
    return 1 << max(limit.bit_length() - 1, 0)


def _group_backward(
    inputs: Arrays,
    index: Array,
    state: Array,
    d_o: Array,
    d_state: Array,
    blocking: Blocking,
    through: Through | None,
) -> tuple[Array, Arrays]:
    """Cotangents of a group's first state and inputs, from those of its outputs and last state."""
    factors = prepare(inputs, index, blocking)
    d_o = enter(d_o[:, :, None], index, blocking, d_state.dtype)[..., 0, :, :]
    if through:
        maps = maps_of(factors, blocking)
        states = states_between(maps, state, blocking.careful)
        done = Pass(states[-1], states, *meet(factors, states, blocking))
        d_state, found = _all_back(factors, done, maps.transitions, d_o, d_state, blocking, through)
    else:
        done = carry(factors, state, blocking)
        d_state, found = _carry_back(factors, done, d_o, d_state, blocking)
    d_v, d_beta, d_scores = _writes_backward(factors, done, d_o, found.rights, blocking)

    decay = factors.decay
    d_rows, d_k, d_g = decayed_scores_backward(d_scores, factors.scores, factors.rows, factors.k, decay, blocking.to)
    d_read, d_write = found.reads.reshape(factors.rows.shape), found.writes.reshape(factors.k.shape)
    if decay is None:
        d_rows, d_k = d_rows + d_read, d_k + d_write
    else:
        d_rows, d_k = d_rows + d_read * decay.start[..., None, :, :], d_k + d_write * decay.end[..., None, :, :]
    if inputs.g is not None and decay is not None and d_g is not None:
        terms = [factors.reads * merged(d_read), factors.writes * merged(d_write), decay.whole * found.wholes]
        if inputs.g.shape[-1] == 1:
            terms = [jnp.sum(x, -1, keepdims=True) for x in terms]
        start, end = (jnp.sum(_by_set(x, blocking), -3) for x in terms[:2])
        d_g = leave((d_g + boundary_gate_gradient(start, end, terms[2]))[..., None, :, :])

    key_heads, d_erase = inputs.k.shape[3], None
    if blocking.erases and inputs.erase is None:
        d_k = d_k + d_rows[..., :-1, :, :]
    elif inputs.erase is not None:
        d_erase = leave(d_rows[..., :-1, :, :], inputs.erase.shape[3])
    return d_state, Arrays(
        q=leave(blocking.scale * d_rows[..., -1:, :, :], key_heads),
        k=leave(d_k, key_heads),
        v=leave(_by_set(d_v, blocking)),
        beta=None if d_beta is None else leave(_by_set(d_beta, blocking)),
        g=None if inputs.g is None else d_g,
        erase=d_erase,
        initial_state=None,
        reset=None,
    )


class _PassCotangents(NamedTuple):
    """What the cotangents of the states give of every chunk: cotangents of b B and of `Factors` of these names."""

    rights: Array  # [group, batch, heads, n C, V]
    reads: Array  # [..., rows C, K]
    writes: Array  # [..., n C, K]
    wholes: Array  # of the decays over the chunk, [..., 1, K]


class _Way(NamedTuple):
    """What is known of the way back before the cotangent of any state is."""

    outputs: Array  # d_o, [group, batch, heads, C, V]
    from_outputs: Array  # P^T d_o, [..., n C, V]
    inverse: Array | None  # transposed
    read_keys: Array  # the reads transposed, with a minus where they erase
    sign: Array  # that minus


def _way(factors: Factors, d_o: Array, blocking: Blocking) -> _Way:
    # With a sign on the erase rows the state's cotangent is one product with [d_new; d_o].
    signs = np.repeat([-1.0, 1.0], [blocking.writes * blocking.chunk * blocking.erases, blocking.chunk])
    sign = constant(signs[:, None], d_o)
    from_outputs = einsum("...ij,...jv->...iv", transposed(query_scores(factors)), d_o, to=blocking.to)
    inverse = None if factors.inverse is None else transposed(factors.inverse)
    return _Way(d_o, from_outputs, inverse, transposed(factors.reads * sign), sign)


def _carry_back(
    factors: Factors, done: Pass, d_o: Array, d_state: Array, blocking: Blocking
) -> tuple[Array, _PassCotangents]:
    """The state's cotangent through the chunks of a group, last chunk first."""
    way = _way(factors, d_o, blocking)
    chunks: list[_PassCotangents] = []
    for n in reversed(range(blocking.group)):
        found, d_read = _chunk_back(factors, done, way, d_state, blocking, n)
        chunks.append(found)
        change = einsum("...ki,...iv->...kv", way.read_keys[n], d_read)
        d_state = through_chunk(d_state, factors.decay, n) + change
    found = jax.tree.map(lambda *x: jnp.stack(x), *chunks[::-1])
    return d_state, found._replace(reads=found.reads * way.sign)


def _all_back(
    factors: Factors,
    done: Pass,
    transitions: Array,
    d_o: Array,
    d_state: Array,
    blocking: Blocking,
    through: Through,
) -> tuple[Array, _PassCotangents]:
    """What `_carry_back` gives, of all chunks of a group at once."""
    way = _way(factors, d_o, blocking)
    d_read = _to_reads(factors, way, way.from_outputs, blocking, ...)[1]
    sent = einsum("...ki,...iv->...kv", way.read_keys, d_read, to=blocking.to)
    d_states, d_state = through(Maps(transitions, sent), d_state, blocking.careful, backwards=True)
    found, _ = _chunk_back(factors, done, way, d_states, blocking, ...)
    return _admitting(d_state, found.rights), found._replace(reads=found.reads * way.sign)


def _admitting(state: Array, found: Array) -> Array:
    """A group's last state, NaN for heads of which something in its chunks is not finite.

    What overflows inside a segment meets other segments in its chunk, but no later state where chunks become one map. It is
    the last state that containment looks at.
    """
    finite = jnp.all(jnp.isfinite(found), (0, -2, -1))[..., None, None]
    return jnp.where(finite, state, jnp.full((), jnp.nan, state.dtype))


def _chunk_back(
    factors: Factors, done: Pass, way: _Way, d_state: Array, blocking: Blocking, n: int | EllipsisType
) -> tuple[_PassCotangents, Array]:
    """Cotangents of chunk `n` from that of the state after it, or of all chunks; and of what it read of the state."""
    d_write = way.from_outputs[n] + einsum("...jk,...kv->...jv", factors.writes[n], d_state, to=blocking.to)
    d_right, d_read = _to_reads(factors, way, d_write, blocking, n)
    found = _PassCotangents(
        rights=d_right,
        reads=einsum("...iv,...kv->...ik", d_read, done.states[n], to=blocking.to),
        writes=einsum("...jv,...kv->...jk", done.writes[n], d_state, to=blocking.to),
        wholes=jnp.sum(done.states[n] * d_state, -1)[..., None, :],
    )
    return found, d_read


def _to_reads(
    factors: Factors, way: _Way, d_write: Array, blocking: Blocking, n: int | EllipsisType
) -> tuple[Array, Array]:
    """Cotangents of b B and of what is read of the state, from those of the writes."""
    d_right = (
        d_write if way.inverse is None else einsum("...ij,...jv->...iv", way.inverse[n], d_write, to=blocking.careful)
    )
    if not blocking.erases:
        return d_right, way.outputs[n]
    d_new = d_right if factors.beta is None else factors.beta[n] * d_right
    return d_right, jnp.concatenate([d_new, way.outputs[n]], -2)


def _writes_backward(
    factors: Factors, done: Pass, d_o: Array, d_right: Array, blocking: Blocking
) -> tuple[Array, Array | None, Array]:
    """Cotangents of the values, the step sizes and the scores; the writes solve (I + A) R = b B, so d_A = -d_right R^T."""
    beta = factors.beta
    d_products = jnp.concatenate([-d_right, d_o], -2) if blocking.erases else d_o
    d_products = einsum("...iv,...jv->...ij", d_products, done.writes, to=blocking.to)
    d_scores = masked(visible(blocking), d_products.reshape(factors.scores.shape))
    if beta is None:
        return d_right, None, d_scores
    d_v, d_beta = beta * d_right, jnp.sum(d_right * done.news, -1, keepdims=True)
    if blocking.erases:
        d_a = d_scores[..., :-1, :, :, :]
        d_beta = d_beta + jnp.sum(d_a * factors.scores[..., :-1, :, :, :], (-2, -1)).reshape(d_beta.shape)
        d_a = beta.reshape(*d_a.shape[:-2], 1, 1) * d_a
        d_scores = jnp.concatenate([d_a, d_scores[..., -1:, :, :, :]], -4)
    return d_v, d_beta, d_scores


def _by_set(x: Array, blocking: Blocking) -> Array:
    """Rows of all sets, `[..., sets C, dim]`, as `[..., sets, C, dim]`."""
    return x.reshape(*x.shape[:-2], -1, blocking.chunk, x.shape[-1])
