"""What a step costs before it runs: the arithmetic of its products, and the bytes its devices exchange."""

import math
import re
from collections import defaultdict
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from delta_jax.compiled.hlo import COLLECTIVES, computations, trips
from delta_jax.compiled.jaxpr import grid_of, inner_jaxprs, open_jaxpr, tile_multiply_adds

_COLLECTIVE = re.compile(rf" = (.*?) ({'|'.join(COLLECTIVES)})(-start)?\(")
_WITH_OPERANDS = ("all-gather", "reduce-scatter", "collective-permute")  # as what their "-start" gives begins
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)[a-z0-9]*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|condition|body|branch_computations)=(%?[\w.-]+|\{[^}]*\})")


def product_flops(jaxpr: Jaxpr | ClosedJaxpr) -> float:
    """Floating-point operations of all matrix products and convolutions that a jaxpr computes, on all its devices.

    Loops count as often as they run, kernels as often as their grid has steps, and what is computed again for the
    backward pass counts again. (XLA's own figure counts the body of a loop once and a kernel not at all.)
    """
    return sum((_equation_flops(equation) for equation in open_jaxpr(jaxpr).eqns), 0.0)


def collective_bytes(hlo: str) -> dict[str, float]:
    """Bytes that each device receives in a run of a compiled program, by kind of collective.

    With n devices in a group, an all-gather, a reduce-scatter and an all-to-all bring (n - 1) / n of the whole array,
    an all-reduce twice that, a permute all of it; loops count as often as they run.

    Args:
        hlo: the text of the compiled program, of a TPU or of any other device.

    Returns:
        kind -> bytes, for the kinds there are.
    """
    entry, lines = computations(hlo)
    runs: dict[str, int] = defaultdict(int)
    _count_runs(entry, 1, lines, runs)
    partitions = re.search(r"num_partitions=(\d+)", hlo)
    devices = int(partitions.group(1)) if partitions else 1
    # The TPU compiler overlaps a collective with other work and repeats it in every fusion that advances it, those of
    # a loop inside included: the channel tells which are one, and the outermost how often it runs.
    seen: dict[tuple[str, str], float] = {}
    for name, number in runs.items():
        for index, line in enumerate(lines[name]):
            found = _COLLECTIVE.search(line)
            if found is None:
                continue
            kind, group = found.group(2), _group(line, devices)
            size = _size(found.group(1), halves=bool(found.group(3)) and kind in _WITH_OPERANDS)
            if kind == "reduce-scatter":
                size *= group
            elif name.startswith("all-reduce-scatter"):  # the TPU compiler's form: an all-reduce whose result is cut
                kind = "reduce-scatter"
            channel = re.search(r"channel_id=(\d+)", line)
            key = (kind, channel.group(1) if channel else f"{name}/{index}")
            received = number * size * _share(kind, group)
            seen[key] = min(seen.get(key, received), received)
    totals: dict[str, float] = defaultdict(float)
    for (kind, _), size in seen.items():
        totals[kind] += size
    return {kind: totals[kind] for kind in COLLECTIVES if totals[kind]}


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


def _count_runs(name: str, times: int, lines: dict[str, list[str]], runs: dict[str, int]) -> None:
    runs[name] += times
    for line in lines[name]:
        called = [part.strip(" %{}") for match in _CALLED.findall(line) for part in match.split(",")]
        often = trips(line, lines) if " while(" in line else 1
        for inner in called:
            if inner in lines:
                _count_runs(inner, times * often, lines, runs)


def _size(shapes: str, *, halves: bool) -> float:
    """Bytes of an array or a tuple; of the second half of a tuple that begins with the operands."""
    sizes = [
        math.prod(int(n) for n in dims.split(",") if n) * (1 if dtype == "pred" else int(bits) / 8)
        for dtype, bits, dims in _ARRAY.findall(re.sub(r"\{[^{}]*\}", "", shapes))
    ]
    return sum(sizes[len(sizes) // 2 :] if halves else sizes, 0.0)


def _group(line: str, devices: int) -> int:
    """Devices in a group of a collective; no groups are one group of all."""
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(found.group(1))
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return found.group(1).count(",") + 1
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
        sizes = dict(re.findall(r"('\w+')=(\d+)", found.group(1)))
        # A part of an axis is written 'axis':(devices before it)devices.
        axes = [axis.strip() for axis in found.group(2).split(",")]
        return math.prod(int(sizes.get(axis, axis.rpartition(")")[2])) for axis in axes)
    return devices


def _share(kind: str, group: int) -> float:
    if kind == "collective-permute":
        return 1.0
    return (2 if kind == "all-reduce" else 1) * (group - 1) / group
