"""The op with its tokens cut over an axis of a mesh: every device has a piece of the sequence.

A piece takes a state S to M S + L (`delta_jax.ops.transitions`): L is what it leaves of a zero state, and M, its transition,
what it leaves of the identity where the values are zero. Both are columns of one state, of value + key channels, so that
the op itself finds them, in any implementation. Joined over the devices they give the state before every piece, from which
the op then runs; nothing is added to its outputs afterwards, and their errors are its own. The cotangent of the state goes
the other way, dS = M^T dS' + D, with D what the outputs of a piece send to the state before it. What is exchanged are
states, float32 and as many for a million tokens as for a thousand.

Sources: LASP-2 (Sun et al., 2025, arXiv 2502.07563) gathers the states; ZeCO (Chou et al., 2025, arXiv 2507.01004) sends
them along a ring in blocks. Both for linear attention, whose transitions are diagonal.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from delta_jax.ops.arguments import Arguments
from delta_jax.ops.arrays import Arrays, Options
from delta_jax.ops.implementations import Implementation
from delta_jax.ops.precision import accumulator_dtype, varying_like
from delta_jax.ops.segments import segment_starts
from delta_jax.ops.transitions import Maps, after, states_before

Join = Literal["gather", "exchange", "ring"]
BLOCKS = 8  # into which the ring cuts the channels of the values
# What one exchange more costs, as bytes that a link moves meanwhile: two microseconds at 64 GB/s.
ROUND = 2**17


class Sizes(NamedTuple):
    """Of the states that are joined."""

    devices: int
    batch: int
    heads: int
    key: int
    value: int
    erases: bool  # without, transitions are diagonal


def received(join: Join, sizes: Sizes) -> tuple[float, int] | None:
    """Bytes of float32 that each device receives in a pass over the sequence, and in how many rounds.

    None where the join cannot be: an exchange gives every device as many units, a head or a part of its values.

    Examples:
        >>> sizes = Sizes(devices=64, batch=1, heads=16, key=128, value=128, erases=True)
        >>> [round(received(join, sizes)[0] / 2**20, 1) for join in ("gather", "exchange", "ring")]
        [126.0, 5.9, 1.0]
    """
    n, batch, heads, key, value, erases = sizes
    states = batch * heads * key * 4
    transition = key if erases else 1
    if join == "gather":
        return float((n - 1) * states * (value + transition)), 1
    if join == "ring":
        return float(states * value), n - 2 + _blocks(value)
    cut = _cut(sizes)
    return None if cut is None else ((n - 1) / n * states * (cut * transition + 2 * value), 2)


def join_of(sizes: Sizes) -> Join:
    """Which way of joining takes least: bytes, and a share for every round.

    Examples:
        >>> join_of(Sizes(devices=64, batch=1, heads=16, key=128, value=128, erases=True))
        'exchange'
        >>> join_of(Sizes(devices=64, batch=1, heads=6, key=256, value=512, erases=True))  # few and large
        'ring'
    """

    def cost(join: Join) -> float:
        found = received(join, sizes)
        return math.inf if found is None else found[0] + found[1] * ROUND

    return min(_JOINS, key=cost)


def over_axis(
    chosen: Implementation,
    arguments: Arguments,
    options: Options,
    axis: str,
) -> tuple[Array, Array]:
    """Outputs of this device's tokens, and the state after all tokens, the same on every device.

    Args:
      chosen: an implementation of the op, which runs on every piece.
      arguments: this device's tokens, the pieces in the order of the devices; the initial state is that before all of them,
        and segment ids are those of the whole sequence.
      options: of the op.
      axis: the axis of the mesh, of which `jax.shard_map` has made this a part.
    """
    batch, heads, value, key = arguments.v.shape[0], *arguments.v.shape[-2:], arguments.k.shape[-1]
    dtype = accumulator_dtype(arguments.v.dtype)
    first = arguments.initial_state
    if first is None:
        first = varying_like(jnp.zeros((batch, heads, key, value), dtype), arguments.v)
    sizes = Sizes(lax.axis_size(axis), batch, heads, key, value, options.erases)
    reset = None if arguments.segment_ids is None else _resets(arguments.segment_ids, axis)
    both: Any = jax.ShapeDtypeStruct((*arguments.v.shape[:-1], value + key), arguments.v.dtype)
    wide = chosen.unsupported(arguments._replace(v=both)) is None
    arrays = Arrays(*arguments[:6], None, reset)
    static = _Static(chosen.run, options, axis, join_of(sizes), wide)
    o, state = _joined(static, arrays, first.astype(dtype))
    return o, of_last(state, axis)


def require_axis(axis_name: str, others: Mapping[str, Any]) -> None:
    """That there is such an axis, and nothing that does not go with it.

    Raises:
      ValueError: there is no such axis here, or an argument was given that does not go with one.
    """
    for name, x in others.items():
        if x is not None:
            raise ValueError(f"{name} must be None with axis_name={axis_name!r}: it is about sequences that are whole.")
    try:
        lax.axis_size(axis_name)
    except (NameError, TypeError):
        raise ValueError(
            f"axis_name must be an axis of the jax.shard_map around this call, got {axis_name!r}."
        ) from None


def from_before(x: Array, axis: str) -> Array:
    """What the device before this one along the axis has; zeros on the first."""
    return lax.ppermute(x, axis, [(a, a + 1) for a in range(lax.axis_size(axis) - 1)])


def of_last(x: Array, axis: str) -> Array:
    """What the last device along the axis has, on every device."""
    last = lax.axis_index(axis) == lax.axis_size(axis) - 1
    return lax.psum(jnp.where(last, x, jnp.zeros_like(x)), axis)


class _Static(NamedTuple):
    run: Callable[[Arrays, Options], tuple[Array, Array]]
    options: Options
    axis: str
    join: Join
    wide: bool  # whether values and an identity fit beside each other


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _joined(static: _Static, arrays: Arrays, first: Array) -> tuple[Array, Array]:
    """Outputs and the state after this device's tokens."""
    before, _ = _state_before(static, arrays, first)
    return static.run(arrays._replace(initial_state=before), static.options)


def _forward(static: _Static, arrays: Arrays, first: Array) -> tuple[tuple[Array, Array], Any]:
    # With both kept a backward pass that computes the rest again joins nothing again.
    before, maps = checkpoint_name(_state_before(static, arrays, first), "delta_rule_states")

    def piece(arrays: Arrays, before: Array) -> tuple[Array, Array]:
        return static.run(arrays._replace(initial_state=before), static.options)

    results, pull = jax.vjp(piece, arrays, before)
    return results, (pull, maps)


def _backward(static: _Static, kept: tuple[Any, Maps], cotangents: tuple[Array, Array]) -> tuple[Arrays, Array]:
    pull, maps = kept
    d_o, d_state = cotangents
    # All that comes back to the state before this piece, but by way of later pieces; the op is linear in what comes back.
    _, sent = pull((d_o, d_state))
    sent = maps._replace(left=sent)
    d_arrays, d_before = pull((d_o, d_state + _JOINS[static.join](sent, static.axis, backwards=True)))
    d_first = jnp.where(lax.axis_index(static.axis) == 0, d_before, jnp.zeros_like(d_before))
    return d_arrays, d_first


_joined.defvjp(_forward, _backward)


def _resets(segment_ids: Array, axis: str) -> Array:
    """Where a segment starts; the first token of a piece is compared with the last of the piece before."""
    earlier = from_before(segment_ids[:, -1:], axis)
    starts = segment_starts(segment_ids)
    first = (segment_ids[:, :1] != earlier) & (lax.axis_index(axis) > 0)
    return jnp.concatenate([first, starts[:, 1:]], 1)


def _state_before(static: _Static, arrays: Arrays, first: Array) -> tuple[Array, Maps]:
    """The state before this device's tokens, and what they do to one; of the first device the initial state is in that."""
    mine = lax.axis_index(static.axis) == 0
    maps = _maps(static, arrays, jnp.where(mine, first, jnp.zeros_like(first)))
    return jnp.where(mine, first, _JOINS[static.join](maps, static.axis)), maps


def _maps(static: _Static, arrays: Arrays, first: Array) -> Maps:
    """What the tokens do to a state; `left` is what they leave of the first."""
    batch, heads, key, value = first.shape
    resets = None if arrays.reset is None else jnp.any(arrays.reset, 1)[:, None, None, None]

    def state_after(v: Array, state: Array) -> Array:
        return static.run(arrays._replace(v=v, initial_state=state), static.options)[1]

    if not static.options.erases:
        total = jnp.zeros((batch, heads, 1), first.dtype)
        if arrays.g is not None:
            total = jnp.sum(arrays.g.astype(first.dtype), 1).reshape(batch, heads, -1)
        return Maps(jnp.exp(total)[..., None], state_after(arrays.v, first), resets)
    nothing = varying_like(jnp.zeros((*arrays.v.shape[:-1], key), arrays.v.dtype), arrays.v)
    identity = varying_like(jnp.broadcast_to(jnp.eye(key, dtype=first.dtype), (batch, heads, key, key)), first)
    if static.wide:
        both = jnp.concatenate([arrays.v, nothing], -1), jnp.concatenate([first, identity], -1)
        left = state_after(*both)
        return Maps(left[..., value:], left[..., :value], resets)
    return Maps(state_after(nothing, identity), state_after(arrays.v, first), resets)


def _gather(maps: Maps, axis: str, *, backwards: bool = False) -> Array:
    """The state before a piece from those after all pieces, where the first starts from zero: every device has all maps."""
    everywhere: Maps = jax.tree.map(lambda x: lax.all_gather(x, axis), maps)
    before, _ = states_before(everywhere, jnp.zeros_like(maps.left), backwards=backwards)
    return lax.dynamic_index_in_dim(before, lax.axis_index(axis), 0, keepdims=False)


def _exchange(maps: Maps, axis: str, *, backwards: bool = False) -> Array:
    """The same: every device joins all pieces of its share of the heads, or of parts of their values."""
    n, (batch, heads, key, value) = lax.axis_size(axis), maps.left.shape
    cut = _cut(Sizes(n, batch, heads, key, value, erases=True))
    assert cut is not None, "the join was chosen for other sizes"

    def shares(x: Array) -> Array:
        """`[batch, heads, rows, cut * columns]` as `[devices, units, rows, columns]`."""
        x = jnp.moveaxis(x.reshape(*x.shape[:3], cut, -1), 3, 2)
        return x.reshape(n, -1, x.shape[3], x.shape[4])

    def transposed(x: Array) -> Array:
        return lax.all_to_all(x, axis, 0, 0, tiled=True)

    of_transitions = jnp.broadcast_to(
        maps.transitions[:, :, :, None], (*maps.transitions.shape[:3], cut, maps.transitions.shape[3])
    )
    transitions = shares(of_transitions.reshape(batch, heads, maps.transitions.shape[2], -1))
    left = shares(maps.left)
    rows = transitions.shape[2]
    if rows == key:  # in one exchange
        both = transposed(jnp.concatenate([left, transitions], -1))
        left, transitions = both[..., : left.shape[-1]], both[..., left.shape[-1] :]
    else:
        left, transitions = transposed(left), transposed(transitions)
    resets = None
    if maps.resets is not None:
        of_units = jnp.broadcast_to(maps.resets, (batch, heads, 1, cut))
        resets = transposed(shares(of_units))
    before, _ = states_before(Maps(transitions, left, resets), jnp.zeros_like(left[0]), backwards=backwards)
    before = transposed(before).reshape(batch, heads, cut, key, -1)
    return jnp.moveaxis(before, 2, 3).reshape(maps.left.shape)


def _ring(maps: Maps, axis: str, *, backwards: bool = False) -> Array:
    """The same: a piece sends on what it makes of the state that arrives, block by block of the values' channels."""
    n, i, value = lax.axis_size(axis), lax.axis_index(axis), maps.left.shape[-1]
    if backwards:
        maps = maps._replace(transitions=maps.transitions if maps.transitions.shape[-1] == 1 else maps.transitions.mT)
        i = n - 1 - i
    blocks = _blocks(value)
    left = jnp.stack(jnp.split(maps.left, blocks, axis=-1))
    before, arriving = jnp.zeros_like(left), jnp.zeros_like(left[0])
    turns = n - 2 + blocks
    for turn in range(turns + 1):
        block = turn - i  # what has arrived before this turn, if anything
        at, here = jnp.clip(block, 0, blocks - 1), (block >= 0) & (block < blocks)
        old = lax.dynamic_index_in_dim(before, at, keepdims=False)
        before = lax.dynamic_update_index_in_dim(before, jnp.where(here, arriving, old), at, 0)
        if turn < turns:
            found = after(maps._replace(left=lax.dynamic_index_in_dim(left, at, keepdims=False)), arriving)
            pairs = [(a, a + 1) for a in range(n - 1) if 0 <= turn - a < blocks]
            arriving = lax.ppermute(found, axis, [(n - 1 - a, n - 1 - b) for a, b in pairs] if backwards else pairs)
    return jnp.concatenate(list(before), -1)


_JOINS: dict[Join, Callable[..., Array]] = {"gather": _gather, "exchange": _exchange, "ring": _ring}


def _blocks(value: int) -> int:
    return math.gcd(value, BLOCKS)


def _cut(sizes: Sizes) -> int | None:
    """Into how many parts the values are cut for every device to have as many units; None where that cannot be."""
    n, batch, heads, _, value, _ = sizes
    cut = n // math.gcd(n, batch * heads)
    return cut if value % cut == 0 else None
