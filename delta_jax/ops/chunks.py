"""A group of chunks of the delta rule: its layout, what does not depend on the state, and the pass that carries the state.

The symbols are those of `delta_jax.ops.chunkwise`. Arrays of a group have the axes `[group, batch, heads, chunk, ...]`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from delta_jax.ops.decay import Decay, chunk_decay, decayed_scores
from delta_jax.ops.inverse import unit_lower_inverse
from delta_jax.ops.precision import accumulator_dtype, einsum, transposed
from delta_jax.ops.recurrence import repeat_heads


class Inputs(NamedTuple):
    """The op's arrays over all tokens, `[batch, time, heads, ...]`; None where a member has none."""

    q: Array
    k: Array
    v: Array
    beta: Array | None
    g: Array | None
    erase: Array | None
    reset: Array | None  # true where a segment starts; not differentiated


class Options(NamedTuple):
    """What the shapes do not say; static."""

    scale: float
    chunk: int  # tokens a chunk
    group: int  # chunks a group
    erases: bool


class Factors(NamedTuple):
    """What a group needs besides the state. `rows` are the erase keys and the scaled queries, or the queries alone."""

    rows: Array  # [..., rows, C, K]
    k: Array
    v: Array
    beta: Array | None
    decay: Decay | None
    scores: Array  # decayed scores of the rows with the keys, [..., rows, C, C]: A before beta, and P
    inverse: Array | None  # (I + A)^-1, [..., C, C]
    reads: Array  # the rows decayed since the chunk's start, [..., rows * C, K]
    writes: Array  # the keys decayed to the chunk's end, [..., C, K]


class Pass(NamedTuple):
    """The sequential part of a group: the state after it, and of every chunk the state before it, B, R and its reads."""

    end: Array
    states: list[Array]
    news: list[Array]
    writes: list[Array]
    reads: list[Array]


def prepare(inputs: Inputs, index: Array, options: Options) -> Factors:
    """Everything of group `index` that does not depend on the state."""
    heads, dtype = inputs.v.shape[2], accumulator_dtype(inputs.v.dtype)
    q, k, v = (enter(x, index, options, dtype, heads) for x in (inputs.q, inputs.k, inputs.v))
    beta = None if inputs.beta is None else enter(inputs.beta, index, options, dtype)
    decay = None
    if inputs.g is not None or inputs.reset is not None:
        g = jnp.zeros(v.shape[:-1], dtype) if inputs.g is None else enter(inputs.g, index, options, dtype)
        reset = None if inputs.reset is None else enter(inputs.reset[..., None], index, options, jnp.bool_)
        decay = chunk_decay(g[..., None] if g.ndim == 4 else g, reset)
    rows = options.scale * q[..., None, :, :]
    if options.erases:
        erase = k if inputs.erase is None else enter(inputs.erase, index, options, dtype, heads)
        rows = jnp.concatenate([erase[..., None, :, :], rows], -3)
    scores = decayed_scores(rows, k, decay)
    inverse = None
    if options.erases:
        inverse = unit_lower_inverse(scores[..., 0, :, :] if beta is None else beta[..., None] * scores[..., 0, :, :])
    reads = rows if decay is None else rows * decay.start[..., None, :, :]
    reads = reads.reshape(*reads.shape[:-3], -1, reads.shape[-1])
    return Factors(rows, k, v, beta, decay, scores, inverse, reads, k if decay is None else k * decay.end)


def carry(factors: Factors, state: Array, options: Options) -> Pass:
    """Carries the state through the chunks of a group."""
    result = Pass(state, [], [], [], [])
    write_keys = transposed(factors.writes)
    for n in range(options.group):
        read = einsum("bhik,bhkv->bhiv", factors.reads[n], state)
        new = factors.v[n] - read[..., : options.chunk, :] if options.erases else factors.v[n]
        write = new if factors.beta is None else factors.beta[n][..., None] * new
        if factors.inverse is not None:
            write = einsum("bhij,bhjv->bhiv", factors.inverse[n], write)
        result.states.append(state)
        result.news.append(new)
        result.writes.append(write)
        result.reads.append(read[..., -options.chunk :, :])
        state = through_chunk(state, factors.decay, n) + einsum("bhkj,bhjv->bhkv", write_keys[n], write)
    return result._replace(end=state)


def through_chunk(state: Array, decay: Decay | None, n: int) -> Array:
    """A state, or its cotangent, decayed over the whole of chunk n."""
    return state if decay is None else jnp.swapaxes(decay.whole[n], -1, -2) * state


def visible(options: Options) -> np.ndarray:
    """Which scores of the rows count: those with earlier keys for erasing, with the own key too for the query."""
    lower = np.tril(np.ones((options.chunk,) * 2, bool))
    return np.stack([np.tril(lower, -1), lower]) if options.erases else lower[None]


def enter(x: Array, index: Array, options: Options, dtype: DTypeLike, heads: int | None = None) -> Array:
    """Group `index` of `[batch, time, heads, ...]` as `[group, batch, heads, chunk, ...]`, key heads repeated."""
    tokens = options.group * options.chunk
    x = jax.lax.dynamic_slice_in_dim(x, index * tokens, tokens, 1).astype(dtype)
    if heads is not None:
        x = repeat_heads(x, heads)
    x = x.reshape(x.shape[0], options.group, options.chunk, *x.shape[2:])
    return jnp.moveaxis(jnp.moveaxis(x, 1, 0), 3, 2)


def leave(x: Array, key_heads: int | None = None) -> Array:
    """The reverse of `enter` on `[group, batch, heads, chunk, dim]`, summing over the value heads of a key head."""
    x = jnp.moveaxis(jnp.moveaxis(x, 2, 3), 0, 1)
    x = x.reshape(x.shape[0], -1, *x.shape[3:])
    if key_heads is not None and key_heads != x.shape[2]:
        x = x.reshape(*x.shape[:2], key_heads, -1, x.shape[-1]).sum(3)
    return x


def join(x: Array) -> Array:
    """`[groups, batch, tokens, ...]` as `[batch, time, ...]`."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])
