"""A long sequence of few heads, cut into pieces that the sequential passes go over at the same time.

A piece takes a state S to M S + L. L is what the piece leaves of a zero state, and M, its transition, what it leaves of the
identity where the values are zero: both are columns of one state, of value + key channels. Joined in order they give the
state before every piece, from which the pass proper starts. The cotangent goes the other way, dS = M^T dS' + D, with D what
the piece leaves of a zero cotangent. A reset makes M zero. Products of joining are float32.
"""

import dataclasses

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.gpu.arrays import Prepared, Tokens
from pallas_kernels.gpu.plan import Plan
from pallas_kernels.gpu.reverse import reverse
from pallas_kernels.gpu.scan import scan


def starts_of_pieces(
    plan: Plan, tokens: Tokens, done: Prepared, state: Array | None
) -> tuple[Array | None, Array | None]:
    """The state before every piece `[batch, heads, pieces, key, value]`, and transitions `[..., key, key]`.

    `state` is the one before all tokens, None for zero.
    """
    if plan.pieces == 1:
        return None if state is None else state[:, :, None], None
    shape = (plan.batch, plan.heads, plan.pieces, plan.key)

    def with_zeros(v: Array) -> Array:
        values = v.reshape(*v.shape[:2], plan.heads, plan.value)
        return jnp.pad(values, ((0, 0),) * 3 + ((0, plan.key),)).reshape(*v.shape[:2], -1)

    identity = jnp.broadcast_to(jnp.eye(plan.key), (*shape, plan.key))
    left = scan(
        dataclasses.replace(plan, value=plan.value + plan.key),
        tokens._replace(v=tuple(map(with_zeros, tokens.v))),
        done,
        jnp.concatenate([jnp.zeros((*shape, plan.value), jnp.float32), identity], 4),
        want="ends",
    ).state
    left, transitions = left[..., : plan.value], left[..., plan.value :]
    starts = [jnp.zeros_like(left[:, :, 0]) if state is None else state]
    for piece in range(plan.pieces - 1):
        starts.append(_product(transitions[:, :, piece], starts[-1]) + left[:, :, piece])
    return jnp.stack(starts, 2), transitions


def ends_of_pieces(
    plan: Plan, tokens: Tokens, done: Prepared, d_o: tuple[Array, ...], d_state: Array, transitions: Array | None
) -> Array:
    """The cotangent of the state after every piece, `[batch, heads, pieces, key, value]`, from that after all tokens."""
    if transitions is None:
        return d_state[:, :, None]
    nothing = jnp.zeros((plan.batch, plan.heads, plan.pieces, plan.key, plan.value), jnp.float32)
    left = reverse(plan, tokens, done, d_o, nothing, ends=True).d_state
    ends = [d_state]
    for piece in range(plan.pieces - 1, 0, -1):
        ends.append(_product(transitions[:, :, piece].mT, ends[-1]) + left[:, :, piece])
    return jnp.stack(ends[::-1], 2)


def _product(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)
