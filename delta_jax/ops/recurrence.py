"""The delta rule as its definition: one token after the other.

    S_t = (I - beta_t k_t e_t^T) Diag(exp g_t) S_{t-1} + beta_t k_t v_t^T
    o_t = scale * S_t^T q_t

Everything else in this library computes these two lines faster. The state is decayed first, then what the erase key
`e_t` reads is taken out, then the value is written, then the query reads. With `e_t = k_t` this is DeltaNet
(arXiv 2406.06484), with a gate per head Gated DeltaNet (arXiv 2412.06464), with a gate per key channel Kimi Delta
Attention, with several erases and writes between the decay and the query DeltaProduct (arXiv 2502.10297).
Plain `jax.lax.scan`: differentiable in forward and reverse mode, to any order.
"""

import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

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
    tokens, state = _by_token(q, k, v, beta, g, erase, initial_state, reset, erases)
    state, o = jax.lax.scan(functools.partial(_token, scale), state, tokens)
    return jnp.moveaxis(o, 0, 1), state


def recurrent_with_select(
    q: Array,
    k: Array,
    v: Array,
    beta: Array | None,
    g: Array | None,
    erase: Array | None,
    initial_state: Array | None,
    reset: Array | None,
    *,
    scale: float,
    chunk_size: int | None,
    erases: bool,
) -> tuple[Array, Array]:
    """`recurrent` for a gradient in reverse mode that gets past NaN and infinity.

    The gradient of a token is zero where nothing of it counts, even if the token or the state before it is not finite,
    so a loss over what comes before has its gradient. Memory grows with the cube root of time: states are computed again.
    """
    del chunk_size
    tokens, state = _by_token(q, k, v, beta, g, erase, initial_state, reset, erases)
    time = q.shape[1]
    if not isinstance(time, int):  # a symbolic dimension of `jax.export`
        state, o = jax.lax.scan(functools.partial(_selecting_token, scale), state, tokens)
        return jnp.moveaxis(o, 0, 1), state
    outer = math.ceil(time ** (1 / 3))
    middle = math.ceil((time / outer) ** 0.5)
    inner = -(-time // (outer * middle))
    padding = outer * middle * inner - time  # tokens of zeros, which leave the state as it is

    def parts(x: Array) -> Array:
        x = jnp.pad(x, ((0, padding),) + ((0, 0),) * (x.ndim - 1))
        return x.reshape(outer, middle, inner, *x.shape[1:])

    scan = functools.partial(jax.lax.scan, functools.partial(_selecting_token, scale))
    for _ in range(2):
        scan = functools.partial(jax.lax.scan, jax.checkpoint(scan, prevent_cse=False))
    state, o = scan(state, jax.tree.map(parts, tokens))
    return jnp.moveaxis(o.reshape(-1, *o.shape[3:])[:time], 0, 1), state


class Tokens(NamedTuple):
    """The arrays of one token, or of all with time first, keys repeated for every value head."""

    q: Array
    k: Array
    v: Array
    beta: Array | None
    g: Array | None
    erase: Array | None
    reset: Array | None


def _by_token(
    q: Array,
    k: Array,
    v: Array,
    beta: Array | None,
    g: Array | None,
    erase: Array | None,
    initial_state: Array | None,
    reset: Array | None,
    erases: bool,
) -> tuple[Tokens, Array]:
    """All tokens, and the state before the first."""
    batch, (heads, value_dim) = v.shape[0], v.shape[-2:]
    dtype = accumulator_dtype(v.dtype)
    if initial_state is None:
        initial_state = jnp.zeros((batch, heads, k.shape[-1], value_dim), dtype)
    q, k = repeat_heads(q, heads), repeat_heads(k, heads)
    if erases:
        erase = k if erase is None else repeat_heads(erase, heads)
    state = varying_like(initial_state.astype(dtype), q, k, v, beta, g, erase, reset)
    return jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), Tokens(q, k, v, beta, g, erase, reset)), state


def _token(scale: float, state: Array, token: Tokens) -> tuple[Array, Array]:
    if token.reset is not None:
        state = jnp.where(token.reset[:, None, None, None], 0, state)
    q, k, v, beta, g, erase, _ = jax.tree.map(lambda x: x.astype(state.dtype), token._replace(reset=None))
    o, state = step(state, q, k, v, beta, g, erase, scale)
    return state, o.astype(token.v.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _selecting_token(scale: float, state: Array, token: Tokens) -> tuple[Array, Array]:
    return _token(scale, state, token)


def _token_forward(scale: float, state: Array, token: Tokens) -> tuple[tuple[Array, Array], tuple[Array, Tokens]]:
    return _token(scale, state, token), (state, token)


def _token_backward(
    scale: float, residuals: tuple[Array, Tokens], cotangents: tuple[Array, Array]
) -> tuple[Array, Tokens]:
    d_state, d_o = cotangents
    counts = jnp.any(d_state != 0, (-2, -1)) | jnp.any(d_o != 0, -1)

    def select(x: Any, after_heads: int) -> Any:
        """Zero for the heads of which nothing counts; `after_heads` axes follow that of the heads."""
        if x is None:
            return x
        writes = x.ndim - after_heads - 2
        mask = counts.reshape(counts.shape[0], *(1,) * writes, counts.shape[1], *(1,) * after_heads)
        return jnp.where(mask, x, jnp.zeros((), x.dtype))

    state, (q, k, v, beta, g, erase, reset) = residuals
    of_gate = 0 if g is None else g.ndim - 2
    given = Tokens(
        select(q, 1), select(k, 1), select(v, 1), select(beta, 0), select(g, of_gate), select(erase, 1), None
    )
    _, pull = jax.vjp(lambda state, x: _token(scale, state, x._replace(reset=reset)), select(state, 2), given)
    d_state, d_token = pull(cotangents)
    return d_state, d_token


_selecting_token.defvjp(_token_forward, _token_backward)
