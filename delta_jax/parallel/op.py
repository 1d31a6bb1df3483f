"""What the compiler has to be told inside a model on a mesh: how activations lie, and how a kernel is cut."""

import math
import warnings
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from delta_jax.ops.partition import Axes, axes_of, explicit_mesh
from delta_jax.parallel.mesh import AXES
from delta_jax.parallel.sharding import BATCH, TIME

P = PartitionSpec
HEADS = "tensor"
SEQUENCES = "sequences"
TOKENS = "tokens of a sequence"
LATER = "every device may compute all of them, the same numbers, but slower than of a number that divides."


class Cut(NamedTuple):
    """How sequences and heads lie on a mesh of more than one device, whose axes are left to the compiler.

    Attributes:
        mesh: the mesh.
        batch: the axes over which sequences are cut.
        heads: the axes over which heads are cut.
        time: the axis over which the tokens of a sequence are cut, if there is one of more than one device.
    """

    mesh: AbstractMesh
    batch: tuple[str, ...]
    heads: tuple[str, ...]
    time: tuple[str, ...] = ()


# Of the layer that is being traced, if the types of its arguments say how they are cut.
_EXPLICIT: ContextVar[Cut | None] = ContextVar("explicit", default=None)


def current_cut() -> Cut | None:
    """How a layer that is traced here is cut: as its types say, or over a mesh of ``make_mesh`` that is set.

    Examples:
        >>> current_cut() is None  # no mesh is set
        True
    """
    mesh = jax.sharding.get_abstract_mesh()
    if set(mesh.axis_types) != {AxisType.Auto} or mesh.size == 1:
        return None
    if mesh.axis_names != AXES:
        return _EXPLICIT.get()
    return Cut(mesh, BATCH, (HEADS,), (TIME,) if mesh.shape[TIME] > 1 else ())


def axis_of_tokens(time: int) -> str | None:
    """The axis of the current mesh over which so many tokens of a sequence are cut, each device its own; None where none is.

    Tokens that do not divide over it are whole on each of its devices, with a warning unless there is only one.

    Examples:
        >>> axis_of_tokens(8) is None  # no mesh is set
        True
    """
    cut = current_cut()
    over = () if cut is None else _if_even(cut.mesh, cut.time, time, TOKENS)
    return over[0] if over else None


def spec_of(x: Array) -> P:
    """How the type of an array says that its axes are cut, an entry for each; all None without explicit mesh axes.

    Examples:
        >>> tuple(spec_of(jnp.ones((2, 3))))
        (None, None)
    """
    return P(*(axes_of(x, axis) or None for axis in range(x.ndim)))


def by_compiler[Result](function: Callable[..., Result], arguments: tuple[Any, ...], results: Any) -> Result:
    """``function(*arguments)``, cut by the compiler where types of the arguments speak of explicit mesh axes.

    Inside a layer parameters and activations meet that may be cut in any way, for which explicit axes would want every
    product's result to be told. So a layer is a function whose arguments and results have such types, inside of which there
    are none.

    Args:
        function: of the arguments alone.
        arguments: trees of arrays; the first axis of what is in the second holds sequences.
        results: a tree of partition specs, or of its branches, like what the function returns.

    Examples:
        >>> x = jnp.ones((2, 3))
        >>> by_compiler(lambda scale, x: scale * x, (2.0, x), jax.sharding.PartitionSpec(None, None)).shape
        (2, 3)
    """
    leaves = [x for x in jax.tree.leaves(arguments) if isinstance(x, jax.Array)]
    mesh = explicit_mesh(leaves)
    if mesh is None:
        return function(*arguments)
    cut = Cut(mesh, axes_of(jax.tree.leaves(arguments[1])[0], 0), ())
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), results, is_leaf=lambda x: isinstance(x, P))

    def inside(*arguments: Any) -> Result:
        token = _EXPLICIT.set(cut._replace(mesh=jax.sharding.get_abstract_mesh()))
        try:
            return function(*arguments)
        finally:
            _EXPLICIT.reset(token)

    result: Result = jax.sharding.auto_axes(inside, axes=mesh.explicit_axes, out_sharding=shardings)(*arguments)
    return result


def cut_batch(x: Float[Array, "batch time *rest"]) -> Float[Array, "batch time *rest"]:
    """Cuts batch and time as the mesh says, every device with the other axes whole; ``x`` itself without a mesh.

    Left alone, the compiler may prefer to keep the layout of a parameter and give every device the whole batch, or to cut
    the channels between two layers and gather them for every product. A batch that does not divide over the mesh is left
    alone, with a warning; see ``warn_uncut``. Of a single sequence, as in decoding one prompt, no mesh could make more, and
    nothing is said.

    Examples:
        >>> x = jnp.ones((2, 3))
        >>> cut_batch(x) is x  # no mesh is set
        True
    """
    cut = current_cut()
    batch = () if cut is None else _if_even(cut.mesh, cut.batch, x.shape[0], SEQUENCES)
    time = axis_of_tokens(x.shape[1])
    if not batch and time is None:
        return x
    return jax.lax.with_sharding_constraint(x, P(batch or None, time))


def indivisible(batch: int, heads: int) -> str | None:
    """Why sequences and heads cannot be shared out over the current mesh, as a sentence; None where they can.

    A single sequence is no reason: every device has it whole, which costs nothing.

    Args:
        batch: sequences.
        heads: the smallest number of heads of an argument of the op, those of the keys.

    Examples:
        >>> indivisible(batch=3, heads=2) is None  # no mesh is set
        True
    """
    cut = current_cut()
    if cut is None:
        return None
    whole = _uneven(cut.mesh, cut.batch, batch, SEQUENCES) if batch != 1 else None
    return whole or _uneven(cut.mesh, cut.heads, heads, "key heads")


def shares(batch: int, heads: int = 0) -> bool:
    """Whether `by_shares` can run a kernel here: no mesh of several devices, or one that divides sequences and heads.

    Args:
        batch: sequences.
        heads: what the channels are whole parts of; 0 where they are not cut.

    Examples:
        >>> shares(batch=3)  # no mesh is set
        True
    """
    if current_cut() is not None:
        return indivisible(batch, heads) is None
    mesh = jax.sharding.get_abstract_mesh()
    return bool(mesh.empty or mesh.size == 1 or mesh.are_all_axes_manual)


def share_of(x: Array, axes: Axes) -> jax.ShapeDtypeStruct:
    """What `by_shares` gives every device of an array with such axes, where `shares` says that it can.

    Examples:
        >>> share_of(jnp.ones((2, 3, 4)), ("batch", None, "heads")).shape  # no mesh is set
        (2, 3, 4)
    """
    cut = current_cut()
    if cut is None:
        return jax.ShapeDtypeStruct(x.shape, x.dtype)
    parts = {
        "batch": math.prod(cut.mesh.shape[axis] for axis in cut.batch) if x.shape[0] != 1 else 1,
        "heads": math.prod(cut.mesh.shape[axis] for axis in cut.heads),
        "time": 1,
        None: 1,
    }
    if "time" in axes and axis_of_tokens(x.shape[axes.index("time")]) is not None:
        parts["time"] = math.prod(cut.mesh.shape[axis] for axis in cut.time)
    return jax.ShapeDtypeStruct(tuple(n // parts[of] for n, of in zip(x.shape, axes, strict=True)), x.dtype)


def warn_uncut(reason: str, instead: str = LATER) -> None:
    """Says, while a function is traced, why something is not shared out over the mesh, and what happens in its place."""
    warnings.warn(f"{reason}: {instead}", stacklevel=3)


def by_heads(
    rule: Callable[..., tuple[Array, Any]],
    inputs: Any,
    state: Any,
    segment_ids: Array | None,
    *,
    axes: Any = None,
    axis_name: str | None = None,
) -> tuple[Array, Any]:
    """``rule(inputs, state, segment_ids)``, run by every device on its own sequences and heads.

    The compiler cannot cut a kernel. Under the current mesh the batch is cut over data and fsdp and the heads over
    tensor, so nothing has to be exchanged: sequences and heads do not meet inside the delta rule. Every device has a
    single sequence whole. Without a mesh it is a plain call.

    Args:
        rule: a function of its arguments alone, such as ``delta_rule`` with its options bound.
        inputs: a tree of q [B, T, Hk, K], k, v [B, T, H, V], beta [B, T, H] and the like; its first leaf is q.
        state: [B, H, K, V] or None; or a tree of such arrays with axes in front, and of arrays without axes.
        segment_ids: [B, T] or None.
        axes: a tree like inputs that says which axis of each holds the heads; None is the third of all.
        axis_name: of ``axis_of_tokens`` for a rule that joins the states over that axis; then a device has its own tokens
            alone. None is all of them.

    Returns:
        The output [B, T, H, V] and the final state [B, H, K, V], a tree like that given.

    Raises:
        ValueError: the batch or the key heads do not divide over the mesh.

    Examples:
        >>> x = jnp.ones((1, 3, 2, 4)) / 2
        >>> o, state = by_heads(lambda inputs, state, ids: delta_rule(*inputs, initial_state=state), (x, x, x), None, None)
        >>> o.shape, state.shape
        ((1, 3, 2, 4), (1, 2, 4, 4))
    """
    cut = current_cut()
    if cut is None:
        return rule(inputs, state, segment_ids)
    q = jax.tree.leaves(inputs)[0]
    reason = indivisible(q.shape[0], q.shape[2])
    if reason is not None:
        raise ValueError(f"q has shape {q.shape}, but {reason}.")
    batch, heads = cut.batch if q.shape[0] != 1 else None, cut.heads or None
    of_output, of_state = P(batch, axis_name, heads), P(batch, heads)
    if state is not None:
        of_state = jax.tree.map(lambda x: P(*(None,) * (x.ndim - 4), batch, heads) if x.ndim else P(), state)
    if axes is None:
        axes = jax.tree.map(lambda _: 2, inputs)
    arguments = (inputs, state, segment_ids)
    specs = (
        jax.tree.map(lambda axis: P(batch, axis_name, *(None,) * (axis - 2), heads), axes),
        None if state is None else of_state,
        None if segment_ids is None else P(batch, axis_name),
    )
    # Kernels do not say along which axes their results vary, which the check wants to know.
    by_parts = jax.shard_map(rule, mesh=cut.mesh, in_specs=specs, out_specs=(of_output, of_state), check_vma=False)
    result: tuple[Array, Any] = by_parts(*arguments)
    return result


def by_shares(function: Callable[..., Any], arrays: Sequence[Array | None], axes: Sequence[Axes], results: Any) -> Any:
    """``function(*arrays)``, which calls a kernel, run by every device on its own sequences and heads.

    It is `by_heads` for arrays of any axes; sequences and heads must not meet, and `indivisible` says whether they can be
    cut. A single sequence is whole on every device. Without a mesh it is a plain call.

    Args:
        function: of the arrays, or None in their place.
        arrays: the first begins with sequences.
        axes: what the axes of each are, "batch", "time", "heads" or None.
        results: a tree of the same of what it returns.

    Examples:
        >>> by_shares(jnp.negative, [jnp.ones((2, 3))], [("batch", None)], ("batch", None)).shape
        (2, 3)
    """
    cut = current_cut()
    if cut is None:
        return function(*arrays)
    size = next(x.shape[0] for x in arrays if x is not None)
    names: dict[str | None, Any] = {"batch": cut.batch if size != 1 else None, "heads": cut.heads or None, None: None}
    times = (x.shape[of.index("time")] for x, of in zip(arrays, axes, strict=True) if x is not None and "time" in of)
    names["time"] = next(map(axis_of_tokens, times), None)

    def spec(of: Axes) -> P:
        return P(*(names[name] for name in of))

    there = [x is not None for x in arrays]

    def local(*given: Array) -> Any:
        rest = iter(given)
        return function(*(next(rest) if here else None for here in there))

    specs = tuple(spec(of) for of, here in zip(axes, there, strict=True) if here)
    is_axes = lambda x: isinstance(x, tuple) and all(y is None or isinstance(y, str) for y in x)  # noqa: E731
    out = jax.tree.map(spec, results, is_leaf=is_axes)
    share = jax.shard_map(local, mesh=cut.mesh, in_specs=specs, out_specs=out, check_vma=False)
    return share(*(x for x in arrays if x is not None))


def by_tokens(
    mix: Callable[..., tuple[Array, Array]], tokens: Any, gate: Array, up: Array, down: Array
) -> tuple[Array, Array]:
    """``mix(tokens, gate, up, down)``, run by every device on its own sequences and its channels of every expert.

    The compiler would sort the tokens of all devices together. Under the current mesh the batch is cut over data and
    fsdp, tokens over sequence and the channels of the experts over tensor, whose parts of the output are added up. What does
    not divide is whole on every device, with a warning unless it is a single sequence or token; see ``warn_uncut``. Without
    a mesh it is a plain call.

    Args:
        mix: returns the float32 output [B, T, D], linear in ``down``, and how many tokens every expert got [E].
        tokens: a tree of arrays [B, ...], the first leaf in the dtype of the output.
        gate, up: [E, D, F].
        down: [E, F, D].

    Returns:
        The output [B, T, D] in the dtype of the first leaf, and the load [E] of all devices' tokens.

    Examples:
        >>> def mix(x, gate, up, down):
        ...     return jnp.einsum("btd,edf,efd->btd", x, gate * up, down), jnp.full((2,), 3)
        >>> y, load = by_tokens(mix, jnp.ones((1, 3, 4)), *jnp.ones((2, 2, 4, 5)), jnp.ones((2, 5, 4)))
        >>> y.shape, load.tolist()
        ((1, 3, 4), [3, 3])
    """
    cut, first = current_cut(), jax.tree.leaves(tokens)[0]
    batch: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    if cut is not None:
        batch = _if_even(cut.mesh, cut.batch, first.shape[0], SEQUENCES)
        heads = _if_even(cut.mesh, cut.heads, gate.shape[2], "channels of an expert")
    time = axis_of_tokens(first.shape[1])
    tokens_over = batch if time is None else (*batch, time)
    if cut is None or _parts(cut.mesh, tokens_over + heads) == 1:
        y, load = mix(tokens, gate, up, down)
        return y.astype(first.dtype), load

    def part(tokens: Any, gate: Array, up: Array, down: Array) -> tuple[Array, Array]:
        y, load = mix(tokens, gate, up, down)
        return jax.lax.psum(y, heads).astype(first.dtype), jax.lax.psum(load, tokens_over)

    of_tokens = P(batch, time)
    specs = (jax.tree.map(lambda _: of_tokens, tokens), P(None, None, heads), P(None, None, heads), P(None, heads))
    by_parts = jax.shard_map(part, mesh=cut.mesh, in_specs=specs, out_specs=(of_tokens, P()))
    result: tuple[Array, Array] = by_parts(tokens, gate, up, down)
    return result


def _uneven(mesh: AbstractMesh, axes: tuple[str, ...], number: int, what: str) -> str | None:
    if number % _parts(mesh, axes) == 0:
        return None
    sizes = " x ".join(f"{axis}={mesh.shape[axis]}" for axis in axes)
    return f"the mesh cuts the {what} into {_parts(mesh, axes)} parts ({sizes}), which does not divide {number}"


def _if_even(mesh: AbstractMesh, axes: tuple[str, ...], number: int, what: str) -> tuple[str, ...]:
    """The axes if they divide so many, else none, which a warning says unless one alone is left whole."""
    reason = _uneven(mesh, axes, number, what)
    if reason is not None and number != 1:
        warn_uncut(reason)
    return axes if reason is None else ()


def _parts(mesh: AbstractMesh, axes: tuple[str, ...]) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)
