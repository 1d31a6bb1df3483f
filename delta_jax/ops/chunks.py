"""A group of chunks of the delta rule: its layout, what does not depend on the state, and the passes that carry the state.

The symbols are those of `delta_jax.ops.chunkwise`. The op's arrays are `[batch, time, sets, heads, dim]` here: a token has
one query and one gate but n keys, values, step sizes and erase keys. Those of a group are
`[group, batch, heads, sets, chunk, dim]`. Decays are those between tokens, whichever of their writes are meant. Where sets
are merged, the `n C` rows are the writes of a chunk, all first ones first.
"""

from types import EllipsisType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from delta_jax.ops.arrays import Arrays
from delta_jax.ops.decay import Decay, chunk_decay, decayed_scores, merged
from delta_jax.ops.inverse import unit_lower_inverse
from delta_jax.ops.precision import accumulator_dtype, einsum, transposed
from delta_jax.ops.recurrence import repeat_heads


class Blocking(NamedTuple):
    """How the tokens are cut, and what else the shapes do not say; static."""

    scale: float
    chunk: int  # tokens a chunk
    group: int  # chunks a group
    writes: int  # of a token
    erases: bool
    to: jnp.dtype  # operands of products with inputs and states are as precise as this

    @property
    def careful(self) -> jnp.dtype:
        """The same of products whose errors others enlarge: in the inverse sums cancel where eigenvalues are below zero."""
        return jnp.dtype(jnp.float16) if self.to == jnp.bfloat16 else self.to


class Factors(NamedTuple):
    """What a group needs besides the state. `rows` are the erase keys and the scaled queries, or the queries alone."""

    rows: Array  # [..., rows, C, K]
    k: Array  # [..., n, C, K]
    v: Array  # [..., n C, V]
    beta: Array | None  # [..., n C, 1]
    decay: Decay | None
    scores: Array  # decayed scores of the rows with the keys, [..., rows, C, n, C]: A before beta, and P
    inverse: Array | None  # (I + A)^-1, [..., n C, n C]
    reads: Array  # the rows decayed since the chunk's start, [..., rows C, K]
    writes: Array  # the keys decayed to the chunk's end, [..., n C, K]


class Pass(NamedTuple):
    """What depends on the state: the one after the group, and of every chunk the one before it, B, R and its reads."""

    end: Array
    states: Array
    news: Array
    writes: Array
    reads: Array


def prepare(inputs: Arrays, index: Array, blocking: Blocking) -> Factors:
    """Everything of group `index` that does not depend on the state."""
    heads, dtype = inputs.v.shape[3], accumulator_dtype(inputs.v.dtype)
    q, k, v = (enter(x, index, blocking, dtype, heads) for x in (inputs.q, inputs.k, inputs.v))
    beta = None if inputs.beta is None else enter(inputs.beta, index, blocking, dtype)
    decay = None
    if inputs.g is not None or inputs.reset is not None:
        g = jnp.zeros((*q.shape[:-1], 1), dtype) if inputs.g is None else enter(inputs.g, index, blocking, dtype)
        reset = None if inputs.reset is None else enter(inputs.reset, index, blocking, jnp.bool_)[..., 0, :, 0]
        decay = chunk_decay(g[..., 0, :, :], reset)
    rows = blocking.scale * q
    if blocking.erases:
        erase = k if inputs.erase is None else enter(inputs.erase, index, blocking, dtype, heads)
        rows = jnp.concatenate([erase, rows], -3)
    scores = decayed_scores(rows, k, decay, blocking.to)
    inverse = None
    if blocking.erases:
        a = scores[..., :-1, :, :, :]
        inverse = _inverse(a if beta is None else beta[..., None] * a, blocking)
    reads, writes = rows, k
    if decay is not None:
        reads, writes = rows * decay.start[..., None, :, :], k * decay.end[..., None, :, :]
    if beta is not None:
        beta = merged(beta)
    return Factors(rows, k, merged(v), beta, decay, scores, inverse, merged(reads), merged(writes))


def _inverse(a: Array, blocking: Blocking) -> Array:
    """(I + A)^-1 for A `[..., n, C, n, C]`: triangular only in the order of time, a token's writes next to one another."""
    writes, chunk = a.shape[-4:-2]

    def transposed_sets(x: Array) -> Array:
        return jnp.swapaxes(jnp.swapaxes(x, -4, -3), -2, -1)

    x = transposed_sets(a).reshape(*a.shape[:-4], writes * chunk, writes * chunk)
    x = unit_lower_inverse(x, blocking.careful).reshape(*a.shape[:-4], chunk, writes, chunk, writes)
    return transposed_sets(x).reshape(*a.shape[:-4], writes * chunk, writes * chunk)


def carry(factors: Factors, state: Array, blocking: Blocking) -> Pass:
    """Carries the state through the chunks of a group, one after the other."""
    states, chunks = [], []
    write_keys = transposed(factors.writes)
    for n in range(blocking.group):
        states.append(state)
        chunks.append(meet(factors, state, blocking, n))
        change = einsum("...kj,...jv->...kv", write_keys[n], chunks[n][1])
        state = through_chunk(state, factors.decay, n) + change
    return Pass(state, jnp.stack(states), *(jnp.stack(x) for x in zip(*chunks, strict=True)))


def meet(factors: Factors, state: Array, blocking: Blocking, n: int | EllipsisType = ...) -> tuple[Array, Array, Array]:
    """B, R and what the queries read of chunk `n` and the state before it, or of all chunks and the states before them."""
    read = einsum("...ik,...kv->...iv", factors.reads[n], state, to=blocking.to)
    new = factors.v[n] - read[..., : -blocking.chunk, :] if blocking.erases else factors.v[n]
    return new, solve(factors, new, blocking, n), read[..., -blocking.chunk :, :]


def solve(factors: Factors, right: Array, blocking: Blocking, n: int | EllipsisType = ...) -> Array:
    """R of (I + A) R = b B."""
    right = right if factors.beta is None else factors.beta[n] * right
    if factors.inverse is None:
        return right
    return einsum("...ij,...jv->...iv", factors.inverse[n], right, to=blocking.careful)


def query_scores(factors: Factors) -> Array:
    """P, `[..., C, n C]`."""
    p = factors.scores[..., -1, :, :, :]
    return p.reshape(*p.shape[:-2], -1)


def through_chunk(state: Array, decay: Decay | None, n: int | EllipsisType = ...) -> Array:
    """A state, or its cotangent, decayed over the whole of chunk n."""
    return state if decay is None else jnp.swapaxes(decay.whole[n], -1, -2) * state


def visible(blocking: Blocking) -> np.ndarray:
    """Which scores `[rows, C, n, C]` count: those with earlier writes for erasing, with all of its token for the query."""
    row, token, write, other = np.indices((blocking.writes + 1, blocking.chunk, blocking.writes, blocking.chunk))
    seen = (token > other) | ((token == other) & (row > write))
    return seen if blocking.erases else seen[-1:]


def enter(x: Array, index: Array, blocking: Blocking, dtype: DTypeLike, heads: int | None = None) -> Array:
    """Group `index` of `[batch, time, sets, heads, dim]` as `[group, batch, heads, sets, chunk, dim]`, keys repeated."""
    tokens = blocking.group * blocking.chunk
    x = jax.lax.dynamic_slice_in_dim(x, index * tokens, tokens, 1).astype(dtype)
    if heads is not None:
        x = repeat_heads(x, heads)
    x = x.reshape(x.shape[0], blocking.group, blocking.chunk, *x.shape[2:])
    return jnp.transpose(x, (1, 0, 4, 3, 2, 5))


def leave(x: Array, key_heads: int | None = None) -> Array:
    """The reverse of `enter`, summing over the value heads of a key head."""
    x = jnp.transpose(x, (1, 0, 4, 3, 2, 5))
    x = x.reshape(x.shape[0], -1, *x.shape[3:])
    if key_heads is not None and key_heads != x.shape[3]:
        x = x.reshape(*x.shape[:3], key_heads, -1, x.shape[-1]).sum(4)
    return x


def join(x: Array) -> Array:
    """`[groups, batch, tokens, ...]` as `[batch, time, ...]`."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])
