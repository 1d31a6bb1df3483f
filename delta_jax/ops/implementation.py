"""What an implementation of the op is: its outputs and its cotangents as functions of arrays."""

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from delta_jax.ops import chunkwise


class Arrays(NamedTuple):
    """The op's arrays, as checked; `reset` is true where a segment starts."""

    q: Array
    k: Array
    v: Array
    beta: Array | None
    g: Array | None
    erase: Array | None
    initial_state: Array | None
    reset: Array | None


class Options(NamedTuple):
    """What is static about a call."""

    scale: float
    chunk_size: int | None
    erases: bool


class Implementation(NamedTuple):
    """One way of computing the op and its cotangents.

    Attributes:
      forward: of arrays and options, the outputs, the final state, and what `backward` wants if it is to be kept.
      backward: of arrays, what was kept, the cotangents of both results and options, the cotangents of the arrays, and by
        itself, in the dtype of states, that of the initial state, which is zero where none is given.
    """

    forward: Callable[[Arrays, Options, bool], tuple[Array, Array, Any]]
    backward: Callable[[Arrays, Any, Array, Array, Options], tuple[Arrays, Array]]


def _xla_forward(arrays: Arrays, options: Options, keep: bool) -> tuple[Array, Array, Array]:
    del keep  # what nobody reads is not computed
    return chunkwise.forward(*arrays, **options._asdict())


def _xla_backward(arrays: Arrays, kept: Array, d_o: Array, d_state: Array, options: Options) -> tuple[Arrays, Array]:
    *found, d_initial = chunkwise.backward(*arrays, kept, d_o, d_state, **options._asdict())
    return _cotangents(*found), d_initial


def _cotangents(q: Array, k: Array, v: Array, beta: Array | None, g: Array | None, erase: Array | None) -> Arrays:
    return Arrays(q, k, v, beta, g, erase, None, None)


def _writes(arrays: Arrays) -> int:
    return arrays.k.shape[2] if arrays.k.ndim > arrays.q.ndim else 1


def _at_write(x: Array, writes: int, index: int) -> Array:
    """What belongs to a token, `[batch, time, ...]`, at one of its writes, `[batch, time * writes, ...]`, else zero."""
    if writes == 1:
        return x
    widths = ((0, 0), (0, 0), (index, writes - 1 - index)) + ((0, 0),) * (x.ndim - 2)
    return jnp.pad(x[:, :, None], widths).reshape(x.shape[0], -1, *x.shape[2:])


def _one_write_a_token(arrays: Arrays) -> Arrays:
    """The kernels take one write a token: a token of n becomes n, of which the first is gated and the last queried."""
    writes = _writes(arrays)
    if arrays.k.ndim == arrays.q.ndim:
        return arrays
    flat = {name: getattr(arrays, name) for name in ("k", "v", "beta", "erase")}
    flat = jax.tree.map(lambda x: x.reshape(x.shape[0], -1, *x.shape[3:]), flat)
    first = {name: getattr(arrays, name) for name in ("g", "reset")}
    first = jax.tree.map(lambda x: _at_write(x, writes, 0), first)
    return arrays._replace(q=_at_write(arrays.q, writes, writes - 1), **flat, **first)


XLA = Implementation(_xla_forward, _xla_backward)


@functools.cache
def pallas(kernels: ModuleType) -> Implementation:
    """A package of kernels."""

    def forward(arrays: Arrays, options: Options, keep: bool) -> tuple[Array, Array, Any]:
        tokens, writes = _one_write_a_token(arrays), _writes(arrays)
        o, state, kept = kernels.forward(*tokens, scale=options.scale, erases=options.erases, keep=keep)
        return o[:, writes - 1 :: writes], state, kept

    def backward(arrays: Arrays, kept: Any, d_o: Array, d_state: Array, options: Options) -> tuple[Arrays, Array]:
        tokens, pull = jax.vjp(_one_write_a_token, arrays._replace(initial_state=None, reset=None))
        writes, reset = _writes(arrays), arrays.reset
        *found, d_initial = kernels.backward(
            *tokens._replace(
                initial_state=arrays.initial_state, reset=None if reset is None else _at_write(reset, writes, 0)
            ),
            kept,
            _at_write(d_o, writes, writes - 1),
            d_state,
            scale=options.scale,
            erases=options.erases,
        )
        return pull(_cotangents(*found))[0], d_initial

    return Implementation(forward, backward)
