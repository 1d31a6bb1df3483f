"""A package of kernels as an implementation of the op: tokens of several writes, and what is cast."""

import functools
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import Array

from delta_jax.ops.arrays import Arrays, Options
from delta_jax.ops.containment import Passes
from pallas_kernels.inputs import Inputs


@runtime_checkable
class Kernels(Protocol):
    """What a package of kernels offers; `pallas_kernels.tpu` documents every function."""

    def __hash__(self) -> int: ...

    def unsupported(self, inputs: Inputs, /) -> str | None: ...

    def forward(
        self,
        inputs: Inputs,
        initial_state: Array | None,
        reset: Array | None,
        /,
        *,
        scale: float,
        erases: bool,
        keep: bool,
    ) -> tuple[Array, Array, Any]: ...

    def backward(
        self,
        inputs: Inputs,
        initial_state: Array | None,
        reset: Array | None,
        kept: Any,
        d_o: Array,
        d_state: Array,
        /,
        *,
        scale: float,
        erases: bool,
    ) -> tuple[Inputs, Array]: ...

    @property
    def delta_rule_step(self) -> Callable[..., tuple[Array, Array]]:
        """Of a state and the inputs of a few tokens; those that work in place also take a layer."""

    def as_they_lie(self, arrays: Any, /) -> Any: ...


@functools.cache
def passes_of(kernels: Kernels) -> Passes:
    """Forward and backward by a package of kernels."""

    def forward(arrays: Arrays, options: Options, keep: bool) -> tuple[Array, Array, Any]:
        writes, erases = arrays.writes, options.erases
        o, state, kept = kernels.forward(
            _inputs(arrays), arrays.initial_state, _reset(arrays), scale=options.scale, erases=erases, keep=keep
        )
        return o[:, writes - 1 :: writes], state, kept

    def backward(arrays: Arrays, options: Options, kept: Any, d_o: Array, d_state: Array) -> tuple[Arrays, Array]:
        inputs, pull = jax.vjp(_inputs, arrays._replace(initial_state=None, reset=None))
        found, d_initial = kernels.backward(
            inputs,
            arrays.initial_state,
            _reset(arrays),
            kept,
            _at_write(d_o, arrays.writes, arrays.writes - 1),
            d_state,
            scale=options.scale,
            erases=options.erases,
        )
        return pull(found)[0], d_initial

    return Passes(forward, backward, kernels.as_they_lie)


def step_of(kernels: Kernels, arrays: Arrays, options: Options) -> tuple[Array, Array]:
    """One token by a package of kernels."""
    of_time = jax.tree.map(lambda x: x[:, None], arrays._replace(initial_state=None))
    o, state = steps_of(kernels, of_time._replace(initial_state=arrays.initial_state), options)
    return o[:, 0], state


def steps_of(kernels: Kernels, arrays: Arrays, options: Options, *layer: Array) -> tuple[Array, Array]:
    """A few tokens by a package of kernels; with a layer among the states of all."""
    assert arrays.initial_state is not None
    states = arrays.initial_state.astype(jnp.float32)
    o, states = kernels.delta_rule_step(states, Inputs(*arrays[:6]), *layer, scale=options.scale, erases=options.erases)
    return o, states


def _inputs(arrays: Arrays) -> Inputs:
    """The kernels take one write a token: a token of n becomes n, of which the first is gated and the last queried.

    They take queries of the values' precision alone, which a scale that is an array has left.
    """
    q, writes = arrays.q.astype(arrays.v.dtype), arrays.writes
    if arrays.k.ndim == arrays.q.ndim:
        return Inputs(q, *arrays[1:6])
    written = (arrays.k, arrays.v, arrays.beta, arrays.erase)
    k, v, beta, erase = jax.tree.map(lambda x: x.reshape(x.shape[0], -1, *x.shape[3:]), written)
    return Inputs(_at_write(q, writes, writes - 1), k, v, beta, _at_write(arrays.g, writes, 0), erase)


def _reset(arrays: Arrays) -> Array | None:
    return _at_write(arrays.reset, arrays.writes, 0)


def _at_write(x: Any, writes: int, index: int) -> Any:
    """What belongs to a token, `[batch, time, ...]`, at one of its writes, `[batch, time * writes, ...]`, else zero."""
    if x is None or writes == 1:
        return x
    widths = ((0, 0), (0, 0), (index, writes - 1 - index)) + ((0, 0),) * (x.ndim - 2)
    return jnp.pad(x[:, :, None], widths).reshape(x.shape[0], -1, *x.shape[2:])
