"""What the compiler has to be told inside a model on a mesh: how activations lie, and how a kernel is cut."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, PartitionSpec
from jaxtyping import Array, Float

from delta_jax.parallel.mesh import AXES
from delta_jax.parallel.sharding import BATCH

P = PartitionSpec
HEADS = "tensor"


def current_mesh() -> AbstractMesh | None:
    """The mesh that is set where this is traced, if it is one of ``make_mesh`` over more than one device."""
    mesh = jax.sharding.get_abstract_mesh()
    automatic = set(mesh.axis_types) == {AxisType.Auto}
    return mesh if mesh.axis_names == AXES and automatic and mesh.size > 1 else None


def cut_batch(x: Float[Array, "batch *rest"]) -> Float[Array, "batch *rest"]:
    """Cuts the batch over data and fsdp and leaves the other axes to the compiler; ``x`` itself without a mesh.

    Left alone, the compiler may prefer to keep the layout of a parameter and give every device the whole batch.
    """
    mesh = current_mesh()
    if mesh is None or x.shape[0] % _parts(mesh, BATCH):
        return x
    rest = (P.UNCONSTRAINED,) * (x.ndim - 1)
    return jax.lax.with_sharding_constraint(x, P(BATCH, *rest))


def indivisible(batch: int, heads: int) -> str | None:
    """Why sequences and heads cannot be shared out over the current mesh, as a sentence; None where they can.

    Args:
        batch: sequences.
        heads: the smallest number of heads of an argument of the op, those of the keys.
    """
    mesh = current_mesh()
    if mesh is None:
        return None
    for number, what, axes in ((batch, "sequences", BATCH), (heads, "key heads", (HEADS,))):
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
    """
    mesh = current_mesh()
    if mesh is None:
        return rule(inputs, state, segment_ids)
    q = jax.tree.leaves(inputs)[0]
    reason = indivisible(q.shape[0], q.shape[2])
    if reason is not None:
        raise ValueError(f"q has shape {q.shape}, but {reason}.")
    of_output, of_state = P(BATCH, None, HEADS), P(BATCH, HEADS)
    if axes is None:
        axes = jax.tree.map(lambda _: 2, inputs)
    arguments = (inputs, state, segment_ids)
    specs = (
        jax.tree.map(lambda axis: P(BATCH, *(None,) * (axis - 1), HEADS), axes),
        None if state is None else of_state,
        None if segment_ids is None else P(BATCH),
    )
    # Kernels do not say along which axes their results vary, which the check wants to know.
    cut = jax.shard_map(rule, mesh=mesh, in_specs=specs, out_specs=(of_output, of_state), check_vma=False)
    result: tuple[Array, Array] = cut(*arguments)
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
    """
    mesh, first = current_mesh(), jax.tree.leaves(tokens)[0]
    if mesh is None or first.shape[0] % _parts(mesh, BATCH):
        y, load = mix(tokens, gate, up, down)
        return y.astype(first.dtype), load

    def part(tokens: Any, gate: Array, up: Array, down: Array) -> tuple[Array, Array]:
        y, load = mix(tokens, gate, up, down)
        return jax.lax.psum(y, HEADS).astype(first.dtype), jax.lax.psum(load, BATCH)

    specs = (jax.tree.map(lambda _: P(BATCH), tokens), P(None, None, HEADS), P(None, None, HEADS), P(None, HEADS))
    cut = jax.shard_map(part, mesh=mesh, in_specs=specs, out_specs=(P(BATCH), P()))
    result: tuple[Array, Array] = cut(tokens, gate, up, down)
    return result


def _parts(mesh: AbstractMesh, axes: tuple[str, ...]) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)
