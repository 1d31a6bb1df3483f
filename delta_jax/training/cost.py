"""What a step costs before it runs: the arithmetic of its products."""

import math
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from delta_jax.compiled.jaxpr import grid_of, inner_jaxprs, open_jaxpr, tile_multiply_adds


def product_flops(jaxpr: Jaxpr | ClosedJaxpr) -> float:
    """Floating-point operations of all matrix products and convolutions that a jaxpr computes, on all its devices.

    Loops count as often as they run, kernels as often as their grid has steps, and what is computed again for the
    backward pass counts again. (XLA's own figure counts the body of a loop once and a kernel not at all.)
    """
    return sum((_equation_flops(equation) for equation in open_jaxpr(jaxpr).eqns), 0.0)


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
