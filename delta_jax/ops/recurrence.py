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
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from delta_jax.ops.arrays import Arrays, Options
from delta_jax.ops.precision import accumulator_dtype, einsum, varying_like


class Token(NamedTuple):
    """The arrays of one token, or of all with time first; keys are repeated for every value head."""

    q: Float[Array, "batch heads key"]
    k: Float[Array, "batch *writes heads key"]
    v: Float[Array, "batch *writes heads value"]
    beta: Float[Array, "batch *writes heads"] | None
    g: Float[Array, "batch heads"] | Float[Array, "batch heads key"] | None
    erase: Float[Array, "batch *writes heads key"] | None  # None erases nothing

    def write_by_write(self) -> Iterator["Token"]:
        """The token as its writes one after the other: the first has the gate, the last output is the token's."""
        if self.k.ndim == 3:
            yield self
            return
        for j in range(self.k.shape[1]):
            written = self.k, self.v, self.beta, self.erase
            k, v, beta, erase = jax.tree.map(lambda x, j=j: x[:, j], written)
            yield Token(self.q, k, v, beta, self.g if j == 0 else None, erase)


def step(
    state: Float[Array, "batch heads key value"], token: Token, scale: float
) -> tuple[Float[Array, "batch heads value"], Float[Array, "batch heads key value"]]:
    """One token. Every array has the state's dtype and as many heads."""
    for write in token.write_by_write():
        if write.g is not None:
            state = state * jnp.exp(write.g if write.g.ndim == 3 else write.g[..., None])[..., None]
        new = write.v if write.erase is None else write.v - einsum("bhk,bhkv->bhv", write.erase, state)
        if write.beta is not None:
            new = write.beta[..., None] * new
        state = state + write.k[..., None] * new[..., None, :]
    return scale * einsum("bhk,bhkv->bhv", token.q, state), state


def repeat_heads(x: Float[Array, "*shape heads dim"], num_heads: int) -> Float[Array, "*shape {num_heads} dim"]:
    """Gives every value head the key head of its group (heads h*n .. h*n+n-1 share key head h)."""
    return x if x.shape[-2] == num_heads else jnp.repeat(x, num_heads // x.shape[-2], axis=-2)


def token_of(arrays: Arrays, options: Options) -> Token:
    """The arrays, of one token or all, with keys for every value head."""
    repeat = functools.partial(repeat_heads, num_heads=arrays.v.shape[-2])
    k, erase = repeat(arrays.k), None
    if options.erases:
        erase = k if arrays.erase is None else repeat(arrays.erase)
    return Token(repeat(arrays.q), k, arrays.v, arrays.beta, arrays.g, erase)


def one_token(
    arrays: Arrays, options: Options, step: Callable[[Array, Token, float], tuple[Array, Array]] = step
) -> tuple[Array, Array]:
    """The output of a token in the dtype of its value, and the state after it, by the definition's `step` or another."""
    dtype = accumulator_dtype(arrays.v.dtype)
    token, state = jax.tree.map(lambda x: x.astype(dtype), (token_of(arrays, options), arrays.initial_state))
    o, state = step(state, token, options.scale)
    return o.astype(arrays.v.dtype), state


def recurrent(
    arrays: Arrays, options: Options
) -> tuple[Float[Array, "batch time heads value"], Float[Array, "batch heads key value"]]:
    """The recurrence over all tokens. `chunk_size` plays no part."""
    tokens, state = _by_token(arrays, options)
    state, o = jax.lax.scan(functools.partial(_token, options.scale), state, tokens)
    return jnp.moveaxis(o, 0, 1), state


def recurrent_with_select(arrays: Arrays, options: Options) -> tuple[Array, Array]:
    """`recurrent` for a gradient in reverse mode that gets past NaN and infinity.

    The gradient of a token is zero where nothing of it counts, even if the token or the state before it is not finite,
    so a loss over what comes before has its gradient. Memory grows with the cube root of time: states are computed again.
    """
    tokens, state = _by_token(arrays, options)
    time, token = arrays.q.shape[1], functools.partial(_selecting_token, options.scale)
    if not isinstance(time, int):  # a symbolic dimension of `jax.export`
        state, o = jax.lax.scan(token, state, tokens)
        return jnp.moveaxis(o, 0, 1), state
    outer = math.ceil(time ** (1 / 3))
    middle = math.ceil((time / outer) ** 0.5)
    inner = -(-time // (outer * middle))
    padding = outer * middle * inner - time  # tokens of zeros, which leave the state as it is

    def parts(x: Array) -> Array:
        x = jnp.pad(x, ((0, padding),) + ((0, 0),) * (x.ndim - 1))
        return x.reshape(outer, middle, inner, *x.shape[1:])

    scan = functools.partial(jax.lax.scan, token)
    for _ in range(2):
        scan = functools.partial(jax.lax.scan, jax.checkpoint(scan, prevent_cse=False))
    state, o = scan(state, jax.tree.map(parts, tokens))
    return jnp.moveaxis(o.reshape(-1, *o.shape[3:])[:time], 0, 1), state


# A token and whether a segment starts with it.
_Placed = tuple[Token, Array | None]


def _by_token(arrays: Arrays, options: Options) -> tuple[_Placed, Array]:
    """All tokens, and the state before the first."""
    dtype, state = accumulator_dtype(arrays.v.dtype), arrays.initial_state
    if state is None:
        batch, (heads, value) = arrays.v.shape[0], arrays.v.shape[-2:]
        state = jnp.zeros((batch, heads, arrays.k.shape[-1], value), dtype)
    state = varying_like(state.astype(dtype), *arrays._replace(initial_state=None))
    tokens = token_of(arrays, options), arrays.reset
    return jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tokens), state


def _token(scale: float, state: Array, placed: _Placed) -> tuple[Array, Array]:
    token, reset = placed
    if reset is not None:
        state = jnp.where(reset[:, None, None, None], 0, state)
    o, state = step(state, jax.tree.map(lambda x: x.astype(state.dtype), token), scale)
    return state, o.astype(token.v.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _selecting_token(scale: float, state: Array, placed: _Placed) -> tuple[Array, Array]:
    return _token(scale, state, placed)


def _token_forward(scale: float, state: Array, placed: _Placed) -> tuple[tuple[Array, Array], tuple[Array, _Placed]]:
    return _token(scale, state, placed), (state, placed)


def _token_backward(
    scale: float, residuals: tuple[Array, _Placed], cotangents: tuple[Array, Array]
) -> tuple[Array, tuple[Token, None]]:
    d_state, d_o = cotangents
    counts = jnp.any(d_state != 0, (-2, -1)) | jnp.any(d_o != 0, -1)

    def select(x: Any, after_heads: int) -> Any:
        """Zero for the heads of which nothing counts; `after_heads` axes follow that of the heads."""
        if x is None:
            return x
        writes = x.ndim - after_heads - 2
        mask = counts.reshape(counts.shape[0], *(1,) * writes, counts.shape[1], *(1,) * after_heads)
        return jnp.where(mask, x, jnp.zeros((), x.dtype))

    state, (token, reset) = residuals
    of_gate = 0 if token.g is None else token.g.ndim - 2
    given = Token(*(select(x, axes) for x, axes in zip(token, (1, 1, 1, 0, of_gate, 1), strict=True)))
    _, pull = jax.vjp(lambda state, token: _token(scale, state, (token, reset)), select(state, 2), given)
    d_state, d_token = pull(cotangents)
    return d_state, (d_token, None)


_selecting_token.defvjp(_token_forward, _token_backward)
