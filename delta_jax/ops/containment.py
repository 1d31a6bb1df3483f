"""The op and its gradient by any implementation, with what is not finite kept where it is.

An output depends on the tokens of its segment up to its own, a cotangent on those of its segment from its own on. Products
over all tokens of a chunk do not keep to that: they multiply what does not count by zero, and zero times NaN or infinity
is NaN. But they hide nothing either. Whatever a token writes passes through the products that carry the state, where NaN
and infinity stay what they are, so the final state says whether anything was not finite; on the way back the cotangents
of the initial state and of the gates do. Where one of them says so, the heads and sequences of which it does are computed by
the definition, token by token, in which what does not count is selected away. Otherwise that costs a look at one state.

This is also the one place where the op is differentiated: implementations give outputs and cotangents.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from delta_jax.ops import recurrence
from delta_jax.ops.arrays import Arrays, Options

# The axis of heads of every array but `reset`.
HEADS = {"q": 2, "k": -2, "v": -2, "beta": -1, "g": 2, "erase": -2, "initial_state": 1}


class Passes(NamedTuple):
    """The op one way, and its gradient.

    Attributes:
      forward: of arrays, options and whether anything is kept for `backward`: the outputs, the final state, what is kept.
      backward: of arrays, options, what was kept and the cotangents of both results: the cotangents of the arrays, and by
        itself, in the dtype of states, that of the initial state, which is zero where none is given.
      as_they_lie: of a tree of arrays: the same, in the layout in which kernels have them; None where XLA chooses all of
        them.
    """

    forward: Callable[[Arrays, Options, bool], tuple[Array, Array, Any]]
    backward: Callable[[Arrays, Options, Any, Array, Array], tuple[Arrays, Array]]
    as_they_lie: Callable[[Any], Any] | None = None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 2))
def _run(passes: Passes, arrays: Arrays, options: Options) -> tuple[Array, Array]:
    """Outputs and final state; differentiable in reverse mode."""
    o, state, _ = passes.forward(arrays, options, False)
    return _outputs(passes, arrays, options, o, state, _finite_heads(state))


def _forward(passes: Passes, arrays: Arrays, options: Options) -> tuple[tuple[Array, Array], tuple[Arrays, Any, Array]]:
    o, state, kept = passes.forward(arrays, options, True)
    finite = _finite_heads(state)
    o, state = _outputs(passes, arrays, options, o, state, finite)
    # With both kept a backward pass that computes the rest again needs no second forward pass.
    kept, finite = checkpoint_name((kept, finite), "delta_rule_states")
    return (checkpoint_name(o, "delta_rule_output"), state), (arrays, kept, finite)


def _backward(
    passes: Passes,
    options: Options,
    residuals: tuple[Arrays, Any, Array],
    cotangents: tuple[Array, Array],
) -> tuple[Arrays]:
    arrays, kept, finite = residuals
    found, d_initial = passes.backward(arrays, options, kept, *cotangents)
    if arrays.initial_state is not None:
        found = found._replace(initial_state=d_initial.astype(arrays.initial_state.dtype))
    finite = finite & _finite_heads(d_initial)
    if (
        found.g is not None
    ):  # sums over tokens of products of what passed through the state, which may overflow by themselves
        finite = finite & _finite_heads(jnp.swapaxes(found.g, 1, 2))
    exact = functools.partial(_exact_cotangents, options)
    return (_unless_all(exact, passes.as_they_lie, finite, found, (arrays, cotangents)),)


def _exact_cotangents(
    options: Options, finite: Array, found: Arrays, given: tuple[Arrays, tuple[Array, Array]]
) -> Arrays:
    """Key head by key head, in place: memory set aside for what never happens would make every call slower."""
    arrays, (d_o, d_state) = given
    groups = arrays.q.shape[2]

    def of_group(group: Array, found: Arrays) -> Arrays:
        def part(x: Array, axis: int) -> Array:
            size = x.shape[axis] // groups
            return jax.lax.dynamic_slice_in_dim(x, group * size, size, axis % x.ndim)

        def parts(x: Arrays) -> Arrays:
            there = {name: getattr(x, name) for name in HEADS}
            mine = {name: part(a, HEADS[name]) for name, a in there.items() if a is not None}
            return x._replace(reset=None, **mine)

        def op(mine: Arrays) -> tuple[Array, Array]:
            return recurrence.recurrent_with_select(mine._replace(reset=arrays.reset), options)

        exact = jax.vjp(op, parts(arrays))[1]((part(d_o, 2), part(d_state, 1)))[0]
        mine, updated = part(finite, 1), {}
        for name, axis in HEADS.items():
            x = getattr(found, name)
            if x is not None:
                update = _select(mine, part(x, axis), getattr(exact, name), axis)
                start = group * update.shape[axis]
                updated[name] = jax.lax.dynamic_update_slice_in_dim(x, update, start, axis % x.ndim)
        return found._replace(**updated)

    result: Arrays = jax.lax.fori_loop(0, groups, of_group, found)
    return result


_run.defvjp(_forward, _backward)
run = jax.jit(_run, static_argnums=(0, 2))


def _outputs(
    passes: Passes, arrays: Arrays, options: Options, o: Array, state: Array, finite: Array
) -> tuple[Array, Array]:
    return _unless_all(functools.partial(_exact_outputs, options), passes.as_they_lie, finite, (o, state), arrays)


def _exact_outputs(options: Options, finite: Array, found: tuple[Array, Array], arrays: Arrays) -> tuple[Array, Array]:
    o, state = recurrence.recurrent(arrays, options)
    return _select(finite, found[0], o, 2), _select(finite, found[1], state, 1)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _unless_all[Found](
    exact: Callable[[Array, Found, Any], Found],
    as_they_lie: Callable[[Any], Any] | None,
    finite: Array,
    found: Found,
    given: Any,
) -> Found:
    """What was found if all is finite, else what is exact.

    A loop of one turn or none: its results lie where its arguments do, and a condition would copy them. For the same reason
    what passes between kernels enters it with heads side by side and as it lies: a TPU would lay it out anew, in every call,
    as the work of the rare turn prefers.
    """

    def entering(x: Any) -> Any:
        return x if as_they_lie is None else _side_by_side(x)

    def inside(x: Any) -> Any:
        return x if as_they_lie is None else as_they_lie(x)

    given_flat = entering(given)

    def body(carry: tuple[Array, Any]) -> tuple[Array, Any]:
        # Tied to the carry, or the compiler would take the work out of the loop, which is to do it in every call.
        pending, flat, here = jax.lax.optimization_barrier((*carry, given_flat))
        flat, here = inside((flat, here))
        return pending & ~pending, inside(entering(exact(finite, _as(found, flat), _as(given, here))))

    result = jax.lax.while_loop(lambda carry: carry[0], body, (~_all(finite), entering(found)))[1]
    return _as(found, result)


@_unless_all.defjvp
def _(exact: Any, as_they_lie: Any, primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
    """Derivatives of what is differentiated once more are those of what was found."""
    return _unless_all(exact, as_they_lie, *primals), tangents[1]


def _side_by_side[Tree](x: Tree) -> Tree:
    """Every array of four axes or more with its last two as one."""
    flat: Tree = jax.tree.map(lambda x: x.reshape(*x.shape[:-2], -1) if x.ndim > 3 else x, x)
    return flat


def _as[Tree](like: Tree, flat: Tree) -> Tree:
    """The arrays of `_side_by_side` in the shapes that they had."""
    whole: Tree = jax.tree.map(lambda x, y: y.reshape(x.shape), like, flat)
    return whole


def _finite_heads(x: Array) -> Array:
    """Of which heads all is finite, `[batch, heads]`."""
    return jnp.all(jnp.isfinite(jax.lax.stop_gradient(x)), tuple(range(2, x.ndim)))


def _select(finite: Array, x: Array, exact: Array, axis: int) -> Array:
    """`x` where all value heads of the head on this axis are finite, else `exact`."""
    shape = [1] * x.ndim
    shape[0], shape[axis] = x.shape[0], x.shape[axis]
    return jnp.where(jnp.all(finite.reshape(x.shape[0], x.shape[axis], -1), -1).reshape(shape), x, exact)


@jax.custom_batching.custom_vmap
def _all(finite: Array) -> Array:
    return jnp.all(finite)


@_all.def_vmap
def _(size: int, batched: list[bool], finite: Array) -> tuple[Array, bool]:
    """One answer for all that is mapped, so that a condition stays one and does not become the selection of two results."""
    del size, batched
    return _all(finite), False
