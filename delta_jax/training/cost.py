"""What a step costs before it runs: the arithmetic of its products, and what its devices exchange over which links."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from delta_jax.compiled.exchanges import Exchange, most_received
from delta_jax.compiled.hlo import COLLECTIVES
from delta_jax.compiled.jaxpr import grid_of, inner_jaxprs, open_jaxpr, tile_multiply_adds
from delta_jax.parallel import Link


@dataclass(frozen=True, kw_only=True)
class Exchanged:
    """What a chip receives from others in a step over the same axes of the mesh.

    Attributes:
        axes: their names.
        received: kind of collective -> bytes, of the chip that receives most.
        seconds: how long that takes at least, at the published peak of the links.
    """

    axes: tuple[str, ...]
    received: Mapping[str, float]
    seconds: float


def product_flops(jaxpr: Jaxpr | ClosedJaxpr) -> float:
    """Floating-point operations of all matrix products and convolutions that a jaxpr computes, on all its devices.

    Loops count as often as they run, kernels as often as their grid has steps, and what is computed again for the
    backward pass counts again. (XLA's own figure counts the body of a loop once and a kernel not at all.)
    """
    return sum((_equation_flops(equation) for equation in open_jaxpr(jaxpr).eqns), 0.0)


def exchanged(
    found: Sequence[Exchange], links: Sequence[Link], mesh: Mapping[str, int], cores: int = 1
) -> tuple[Exchanged, ...]:
    """The exchanges of a program by the axes of the mesh they go over, what takes longest first.

    Args:
        found: the exchanges.
        links: what joins the devices of the mesh, from the inside out.
        mesh: size of each axis.
        cores: devices of a chip.
    """
    over: dict[tuple[str, ...], list[Exchange]] = defaultdict(list)
    for exchange in found:
        over[exchange.axes(mesh)].append(exchange)
    rows = []
    for axes, those in over.items():
        received = {
            kind: cores * most_received([exchange for exchange in those if exchange.kind == kind], links[0].place)
            for kind in COLLECTIVES
        }
        received = {kind: size for kind, size in received.items() if size}
        if received:  # not all of it inside of a chip
            rows.append(Exchanged(axes=axes, received=received, seconds=exchange_seconds(those, links)))
    return tuple(sorted(rows, key=lambda row: -row.seconds))


def exchange_seconds(found: Sequence[Exchange], links: Sequence[Link]) -> float:
    """The least that exchanges take: what a device receives over each kind of link at its peak, over all kinds at once.

    What comes from further away does not come over the inner links.
    """
    arrived = [most_received(found, link.place) for link in links]
    inside = zip(arrived, [*arrived[1:], 0.0], links, strict=True)
    return max(((whole - outer) / link.bandwidth for whole, outer, link in inside if whole), default=0.0)


def _equation_flops(equation: JaxprEqn) -> float:
    name, params = equation.primitive.name, equation.params
    operands: list[Any] = [operand.aval for operand in equation.invars]
    results: list[Any] = [result.aval for result in equation.outvars]
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        return 2.0 * results[0].size * math.prod(operands[0].shape[axis] for axis in contracted)
    if name == "ragged_dot_general":  # every row meets one group; a gradient of the groups sums the rows of each
        numbers = params["ragged_dot_dimension_numbers"]
        (contracted, _), _ = numbers.dot_dimension_numbers
        groups = 1 if numbers.rhs_group_dimensions else operands[2].shape[-1]
        return 2.0 * results[0].size / groups * math.prod(operands[0].shape[axis] for axis in contracted)
    if name == "conv_general_dilated":
        kernel, outputs = operands[1], params["dimension_numbers"].rhs_spec[0]
        return 2.0 * results[0].size * kernel.size / kernel.shape[outputs]
    if multiply_adds := tile_multiply_adds(equation):
        return 2.0 * multiply_adds
    inner = [product_flops(jaxpr) for jaxpr in inner_jaxprs(equation)]
    if name == "cond":
        return max(inner)
    times = 1
    if name == "scan":
        times = params["length"]
    elif name == "shard_map":
        times = params["mesh"].size
    elif name in ("pallas_call", "mpmd_map"):
        times = math.prod(grid_of(equation))
    return times * sum(inner, 0.0)
