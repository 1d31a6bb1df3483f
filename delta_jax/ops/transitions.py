"""The states before all chunks of a group, by what a chunk does to a state.

With the symbols of `delta_jax.ops.chunkwise`, a chunk takes a state S to

    S' = M S + N                  M = Diag(exp(G_C)) - (exp(G_C - G) K)^T (I + A)^-1 b exp(G) E
                                  N = (exp(G_C - G) K)^T (I + A)^-1 b V

in which neither M, its transition, nor N depends on S. So both are made of all chunks at once, and what is left to the
sequence is one product a chunk. Two chunks are as one, S'' = M' M S + (M' N + N'). Where heads are few, to start such a
product takes longer than the product, and chunks are joined by pairs, and pairs of pairs, until one is left; its state gives
those before its halves, and so on down to the chunks. The cotangent of the state goes the same way backwards,
dS = M^T dS' + D, with D what the chunk's outputs send to the state before it.

Without an erase M is diagonal, and a column here. Products of M are more precise than inputs of bfloat16: their errors go
from chunk to chunk.
"""

import math
from typing import NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from delta_jax.ops.chunks import Blocking, Factors, solve
from delta_jax.ops.precision import constant, einsum

# Multiplications of joining two chunks that take about as long as the kernels of one chunk of the pass take to start.
JOINED = 2**27


class Maps(NamedTuple):
    """What every chunk does to a state: M S + N."""

    transitions: Array  # M, [chunks, batch, heads, K, K], or a diagonal, [chunks, batch, heads, K or 1, 1]
    left: Array  # N, what is left where the state is zero, [chunks, batch, heads, K, V]
    resets: Array | None = (
        None  # true where nothing of a state gets through, whatever it holds: like `left`, or one for many
    )


def maps_of(factors: Factors, blocking: Blocking) -> Maps:
    """What the chunks of a group do to a state."""
    whole = jnp.ones_like(factors.writes[..., :1, :1]) if factors.decay is None else factors.decay.whole
    right = factors.v
    if blocking.erases:
        right = jnp.concatenate([right, -factors.reads[..., : -blocking.chunk, :]], -1)
    change = einsum("...jk,...jv->...kv", factors.writes, solve(factors, right, blocking), to=blocking.to)
    value = factors.v.shape[-1]
    transitions = jnp.swapaxes(whole, -1, -2)
    if blocking.erases:
        key = np.eye(factors.writes.shape[-1], dtype=bool)
        transitions = jnp.where(constant(key, change), transitions, jnp.zeros((), change.dtype)) + change[..., value:]
    return Maps(transitions, change[..., :value])


@runtime_checkable
class Through(Protocol):
    """How a state passes through all chunks: what `states_before` says, by XLA's products or by a kernel."""

    def __call__(
        self, maps: Maps, state: Array, to: DTypeLike | None, *, backwards: bool = False
    ) -> tuple[Array, Array]: ...


def states_before(
    maps: Maps, state: Array, to: DTypeLike | None = None, *, backwards: bool = False
) -> tuple[Array, Array]:
    """The state before every chunk, and the one after them all, from the one before them all.

    Args:
      maps: what every chunk does to a state, M S + N.
      state: the one before them all.
      to: as in `einsum`.
      backwards: whether it goes through M^T S + N, from the last chunk to the first, as the cotangent of a state does where
        N is D, what the outputs of a chunk send to the state before it; the one "before" then is that of the state after.
    """
    if backwards:
        whole = maps.transitions
        turned = whole if whole.shape[-1] == 1 else jnp.swapaxes(whole, -1, -2)
        resets = None if maps.resets is None else maps.resets[::-1]
        found, end = states_before(Maps(turned[::-1], maps.left[::-1], resets), state, to)
        return found[::-1], end
    chunks = maps.left.shape[0]
    if chunks == 1 or _joining(maps) >= JOINED:
        states = [state]
        for n in range(chunks):  # no loop of XLA's, which would copy every M, N and state besides
            states.append(after(_some(maps, n), states[n], to))
        return jnp.stack(states[:-1]), states[-1]
    first, second = _some(maps, slice(0, chunks - 1, 2)), _some(maps, slice(1, None, 2))
    resets = None if first.resets is None or second.resets is None else first.resets | second.resets
    joined = Maps(_times(second.transitions, first.transitions, to), after(second, first.left, to), resets)
    every_second, end = states_before(joined, state, to)
    if chunks % 2:
        every_second, end = jnp.concatenate([every_second, end[None]]), after(_some(maps, -1), end, to)
    return states_between(maps, every_second, to), end


def states_between(maps: Maps, states: Array, to: DTypeLike | None) -> Array:
    """The states before all chunks, of which `states` are those before the first, the third, and so on."""
    chunks = maps.left.shape[0]
    between = after(_some(maps, slice(0, chunks - 1, 2)), states[: chunks // 2], to)
    both = jnp.stack([states[: chunks // 2], between], 1).reshape(-1, *states.shape[1:])
    return jnp.concatenate([both, states[-1:]]) if chunks % 2 else both


def _joining(maps: Maps) -> int:
    """Multiplications that join two chunks; a symbolic batch, of `jax.export`, counts as one."""
    sizes = (*maps.transitions.shape[1:], maps.transitions.shape[-1] + maps.left.shape[-1])
    return math.prod(size for size in sizes if isinstance(size, int))


def after(maps: Maps, state: Array, to: DTypeLike | None = None) -> Array:
    """The state after chunks that each take one of the states."""
    found = _times(maps.transitions, state, to) + maps.left
    return found if maps.resets is None else jnp.where(maps.resets, maps.left, found)


def _some(maps: Maps, chunks: slice | int) -> Maps:
    return Maps(maps.transitions[chunks], maps.left[chunks], None if maps.resets is None else maps.resets[chunks])


def _times(transition: Array, x: Array, to: DTypeLike | None) -> Array:
    return transition * x if transition.shape[-1] == 1 else einsum("...ij,...jv->...iv", transition, x, to=to)
