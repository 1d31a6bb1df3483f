"""The delta rule as its definition: one token after the other.

    S_t = (I - beta_t k_t e_t^T) Diag(exp g_t) S_{t-1} + beta_t k_t v_t^T
    o_t = scale * S_t^T q_t

Everything else in this library computes these two lines faster. The state is decayed first, then what the erase key
`e_t` reads is taken out, then the value is written, then the query reads. With `e_t = k_t` this is DeltaNet
(arXiv 2406.06484), with a gate per head Gated DeltaNet (arXiv 2412.06464), with a gate per key channel Kimi Delta
Attention, with several erases and writes between the decay and the query DeltaProduct (arXiv 2502.10297).
Plain `jax.lax.scan`: differentiable in forward and reverse mode, to any order.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from delta_jax.ops.precision import accumulator_dtype, einsum, varying_like


def step(
    state: Float[Array, "batch heads key value"],
    q: Float[Array, "batch heads key"],
    k: Float[Array, "batch *writes heads key"],
    v: Float[Array, "batch *writes heads value"],
    beta: Float[Array, "batch *writes heads"] | None,
    g: Float[Array, "batch heads"] | Float[Array, "batch heads key"] | None,
    erase: Float[Array, "batch *writes heads key"] | None,
    scale: float,
) -> tuple[Float[Array, "batch heads value"], Float[Array, "batch heads key value"]]:
    """One token. Every argument has the state's dtype and as many heads; `erase=None` erases nothing."""
    if g is not None:
        state = state * jnp.exp(g if g.ndim == 3 else g[..., None])[..., None]
    for k_j, v_j, beta_j, erase_j in one_by_one(k, v, beta, erase):
        write = v_j if erase_j is None else v_j - einsum("bhk,bhkv->bhv", erase_j, state)
        if beta_j is not None:
            write = beta_j[..., None] * write
        state = state + k_j[..., None] * write[..., None, :]
    return scale * einsum("bhk,bhkv->bhv", q, state), state


def one_by_one(k: Array, *others: Array | None) -> Iterator[tuple[Any, ...]]:
    """The writes of a token one after the other, whether or not its keys `[batch, *writes, heads, key]` have that axis."""
    if k.ndim == 3:
        yield k, *others
    else:
        for j in range(k.shape[1]):
            yield tuple(None if x is None else x[:, j] for x in (k, *others))


def repeat_heads(x: Float[Array, "*shape heads dim"], num_heads: int) -> Float[Array, "*shape {num_heads} dim"]:
    """Gives every value head the key head of its group (heads h*n .. h*n+n-1 share key head h)."""
    return x if x.shape[-2] == num_heads else jnp.repeat(x, num_heads // x.shape[-2], axis=-2)


def recurrent(
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
) -> tuple[Float[Array, "batch time heads value"], Float[Array, "batch heads key value"]]:
    """The recurrence over all tokens; arguments as checked by `delta_jax.ops.api`, `reset` true where a segment starts.

    The writes of a token have an axis of their own where there are several. `erase=None` erases with `k`; with `erases`
    false nothing is erased. `chunk_size` plays no part.
    """
    del chunk_size
    batch, (heads, value_dim) = v.shape[0], v.shape[-2:]
    dtype = accumulator_dtype(v.dtype)
    if initial_state is None:
        initial_state = jnp.zeros((batch, heads, k.shape[-1], value_dim), dtype)

    def body(
        state: Array, token: tuple[tuple[Array, ...], tuple[Array | None, ...], Array | None]
    ) -> tuple[Array, Array]:
        (q, k, v), optional, starts = token
        if starts is not None:
            state = jnp.where(starts[:, None, None, None], 0, state)
        beta, g, erase = (None if x is None else x.astype(dtype) for x in optional)
        o, state = step(state, q.astype(dtype), k.astype(dtype), v.astype(dtype), beta, g, erase, scale)
        return state, o.astype(v.dtype)

    q, k = repeat_heads(q, heads), repeat_heads(k, heads)
    if erases:
        erase = k if erase is None else repeat_heads(erase, heads)
    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), ((q, k, v), (beta, g, erase), reset))
    state = varying_like(initial_state.astype(dtype), q, k, v, beta, g, erase, reset)
    state, o = jax.lax.scan(body, state, tokens)
    return jnp.moveaxis(o, 0, 1), state
