"""What the compiler has to be told inside a model on a mesh: how activations lie, and how a kernel is cut."""

import math
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from delta_jax.ops.partition import axes_of, explicit_mesh
from delta_jax.parallel.mesh import AXES
from delta_jax.parallel.sharding import BATCH

P = PartitionSpec
HEADS = "tensor"


class Cut(NamedTuple):
    """How sequences and heads lie on a mesh of more than one device, whose axes are left to the compiler.

    Attributes:
        mesh: the mesh.
        batch: the axes over which sequences are cut.
        heads: the axes over which heads are cut.
    """

    mesh: AbstractMesh
    batch: tuple[str, ...]
    heads: tuple[str, ...]


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
    return Cut(mesh, BATCH, (HEADS,)) if mesh.axis_names == AXES else _EXPLICIT.get()


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


def cut_batch(x: Float[Array, "batch *rest"]) -> Float[Array, "batch *rest"]:
    """Cuts the batch as the mesh says and leaves the other axes to the compiler; ``x`` itself without a mesh.

    Left alone, the compiler may prefer to keep the layout of a parameter and give every device the whole batch.

    Examples:
        >>> x = jnp.ones((2, 3))
        >>> cut_batch(x) is x  # no mesh is set
        True
    """
    cut = current_cut()
    if cut is None or not cut.batch or x.shape[0] % _parts(cut.mesh, cut.batch):
        return x
    rest = (P.UNCONSTRAINED,) * (x.ndim - 1)
    return jax.lax.with_sharding_constraint(x, P(cut.batch, *rest))


def indivisible(batch: int, heads: int) -> str | None:
    """Why sequences and heads cannot be shared out over the current mesh, as a sentence; None where they can.

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
    mesh = cut.mesh
    for number, what, axes in ((batch, "sequences", cut.batch), (heads, "key heads", cut.heads)):
        if number % _parts(mesh, axes):
            sizes = " x ".join(f"{axis}={mesh.shape[axis]}" for axis in axes)
            return f"the mesh cuts the {what} into {_parts(mesh, axes)} parts ({sizes}), which does not divide {number}"
    return None


def by_heads(
    rule: Callable[..., tuple[Array, Array]],
    inputs: Any,
    state: Array | None,
    segment_ids: Array | None,
    *,
    axes: Any = None,
) -> tuple[Array, Array]:
    """``rule(inputs, state, segment_ids)``, run by every device on its own sequences and heads.

    The compiler cannot cut a kernel. Under the current mesh the batch is cut over data and fsdp and the heads over
    tensor, so nothing has to be exchanged: sequences and heads do not meet inside the delta rule. Without a mesh it is
    a plain call.

    Args:
        rule: a function of its arguments alone, such as ``delta_rule`` with its options bound.
        inputs: a tree of q [B, T, Hk, K], k, v [B, T, H, V], beta [B, T, H] and the like; its first leaf is q.
        state: [B, H, K, V] or None.
        segment_ids: [B, T] or None.
        axes: a tree like inputs that says which axis of each holds the heads; None is the third of all.

    Returns:
        The output [B, T, H, V] and the final state [B, H, K, V].

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
    batch, heads = cut.batch or None, cut.heads or None
    of_output, of_state = P(batch, None, heads), P(batch, heads)
    if axes is None:
        axes = jax.tree.map(lambda _: 2, inputs)
    arguments = (inputs, state, segment_ids)
    specs = (
        jax.tree.map(lambda axis: P(batch, *(None,) * (axis - 1), heads), axes),
        None if state is None else of_state,
        None if segment_ids is None else P(batch),
    )
    # Kernels do not say along which axes their results vary, which the check wants to know.
    by_parts = jax.shard_map(rule, mesh=cut.mesh, in_specs=specs, out_specs=(of_output, of_state), check_vma=False)
    result: tuple[Array, Array] = by_parts(*arguments)
    return result


def by_tokens(
    mix: Callable[..., tuple[Array, Array]], tokens: Any, gate: Array, up: Array, down: Array
) -> tuple[Array, Array]:
    """``mix(tokens, gate, up, down)``, run by every device on its own sequences and its channels of every expert.

    The compiler would sort the tokens of all devices together. Under the current mesh the batch is cut over data and
    fsdp and the channels of the experts over tensor, whose parts of the output are added up; without a mesh, or where
    the batch does not divide, it is a plain call.

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
    if cut is None or not cut.batch or first.shape[0] % _parts(cut.mesh, cut.batch):
        y, load = mix(tokens, gate, up, down)
        return y.astype(first.dtype), load

    def part(tokens: Any, gate: Array, up: Array, down: Array) -> tuple[Array, Array]:
        y, load = mix(tokens, gate, up, down)
        return jax.lax.psum(y, cut.heads).astype(first.dtype), jax.lax.psum(load, cut.batch)

    batch, heads = cut.batch, cut.heads or None
    specs = (jax.tree.map(lambda _: P(batch), tokens), P(None, None, heads), P(None, None, heads), P(None, heads))
    by_parts = jax.shard_map(part, mesh=cut.mesh, in_specs=specs, out_specs=(P(batch), P()))
    result: tuple[Array, Array] = by_parts(tokens, gate, up, down)
    return result


def _parts(mesh: AbstractMesh, axes: tuple[str, ...]) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)
