"""What the kernels of every platform do to the op's arrays before and after: gates, resets, padding."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

LOG2_E = 1.4426950408889634
# exp2 of it is zero in float32, also with the gates above zero added that a segment which does not overflow can have; a new
# segment is such a gate. A power of two, so that bfloat16 holds it.
FORGETS = -1024.0


class Inputs(NamedTuple):
    """The op's arrays over all tokens, `[batch, time, heads, ...]`; `g` has its resets and no fewer than zero heads."""

    q: Array
    k: Array
    v: Array
    beta: Array | None
    g: Array | None
    erase: Array | None

    @property
    def gate(self) -> Literal["none", "head", "channel"]:
        """What has a gate of its own; of one token's arrays, without the axis of time, too."""
        if self.g is None:
            return "none"
        return "channel" if self.g.ndim == self.q.ndim else "head"


def base_two(g: Array) -> Array:
    """Gates as base-2 logarithms, cut far below where exp2 of one is zero, so that sums of many stay finite."""
    return jnp.maximum(g.astype(jnp.float32) * LOG2_E, FORGETS)


def with_resets(g: Array | None, reset: Array | None, v: Array) -> Array | None:
    """The gates, minus infinity where the state is reset."""
    if reset is None:
        return g
    if g is None:
        g = jnp.zeros(v.shape[:3], jnp.float32)
    starts = reset.reshape(*reset.shape, *(1,) * (g.ndim - 2))
    return jnp.where(starts, jnp.asarray(-jnp.inf, g.dtype), g)


def padded(inputs: Inputs, padding: int) -> Inputs:
    """With so many tokens more, which change nothing: their keys are zero."""
    if not padding:
        return inputs
    if inputs.beta is None:
        inputs = inputs._replace(beta=jnp.ones(inputs.v.shape[:3], jnp.float32))
    return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2)), inputs)


def suffix_sums(x: Array, axis: int = -1) -> Array:
    return jnp.flip(jnp.cumsum(jnp.flip(x, axis), axis), axis)


def gate_gradient(pairs: Array, starts: Array, ends: Array, whole: Array, axis: int = -1) -> Array:
    """The cotangent of the gates of a tile from what holds them: pairs, reads from the state, writes to it, the state.

    The tile's tokens lie on `axis`, the whole's shares are summed over. A token's gate is in the reads
    from it on, the writes before it, and the whole.
    """
    first = jax.lax.slice_in_dim(ends, 0, 1, axis=axis)
    before = jnp.concatenate([jnp.zeros_like(first), jax.lax.slice_in_dim(ends, 0, -1, axis=axis)], axis)
    earlier = jnp.cumsum(before, axis)  # no difference of sums
    return pairs + suffix_sums(starts, axis) + earlier + jnp.sum(whole, axis, keepdims=True)
