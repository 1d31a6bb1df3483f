"""The Pallas kernels that a jaxpr calls."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn


class KernelCall(NamedTuple):
    """A pallas_call; `steps` are those of its grid, `results` the shapes of its results."""

    name: str
    steps: int
    results: tuple[tuple[int, ...], ...]
    equation: JaxprEqn

    @property
    def bytes(self) -> int:
        """Between HBM and VMEM, of all blocks that the grid moves; an array that the kernel fetches itself moves once."""
        mapping = self.equation.params["grid_mapping"]
        return sum(block_bytes(block, mapping.grid) for block in mapping.block_mappings)

    def steps_over(self, cores: int) -> int:
        """Steps that each of several cores of a device takes: the longest axis that is parallel is cut over them."""
        grid = self.equation.params["grid_mapping"].grid
        options = self.equation.params["compiler_params"]
        options = options.get("mosaic_tpu", options) if isinstance(options, Mapping) else options
        semantics = getattr(options, "dimension_semantics", None) or ("arbitrary",) * len(grid)
        longest = max((n for n, kind in zip(grid, semantics, strict=True) if str(kind) == "parallel"), default=1)
        return self.steps // longest * -(-longest // cores)


def open_jaxpr(jaxpr: Jaxpr | ClosedJaxpr) -> Jaxpr:
    """The jaxpr without its constants."""
    return jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr


def inner_jaxprs(equation: JaxprEqn) -> Iterator[Jaxpr]:
    """The jaxprs among the parameters of an equation."""
    for value in equation.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, Jaxpr | ClosedJaxpr):
                yield open_jaxpr(item)


def kernel_calls(jaxpr: Jaxpr | ClosedJaxpr, scope: str = "") -> Iterator[KernelCall]:
    """Every pallas_call of a jaxpr in order, also inside the functions it calls; one without a name has theirs.

    What a flag alone decides, a loop that runs in no ordinary step, is left out.
    """
    for equation in open_jaxpr(jaxpr).eqns:
        if equation.primitive.name == "pallas_call":
            grid = equation.params["grid_mapping"].grid
            results: list[Any] = [result.aval for result in equation.outvars]
            shapes = tuple(tuple(aval.shape) for aval in results)
            yield KernelCall(equation.params["name"] or scope, math.prod(grid), shapes, equation)
            continue
        if equation.primitive.name == "while" and not equation.params["cond_jaxpr"].eqns:
            continue
        for inner in inner_jaxprs(equation):
            yield from kernel_calls(inner, equation.params.get("name") or scope)


def block_bytes(block: Any, grid: tuple[int, ...]) -> int:
    """Bytes between HBM and VMEM for one operand: a block moves when its index changes from one grid step to the next.

    An operand that the kernel fetches itself counts once. Scalars that an index is looked up in are taken as zero: there is
    one sequence.
    """
    jaxpr = block.index_map_jaxpr.jaxpr
    steps = np.indices(grid).reshape(len(grid), math.prod(grid)).astype(np.int32)

    def index_of(*at: jax.Array) -> list[Any]:
        values = dict(zip(jaxpr.invars, at, strict=False))

        def value(atom: Any) -> Any:
            return atom.val if hasattr(atom, "val") else values[atom]

        for equation in jaxpr.eqns:
            if equation.primitive.name == "get":
                results = [np.int32(0)]
            else:
                results = equation.primitive.bind(*map(value, equation.invars), **equation.params)
                results = results if equation.primitive.multiple_results else [results]
            values |= zip(equation.outvars, results, strict=True)
        return [value(atom) for atom in jaxpr.outvars]

    index = [np.broadcast_to(np.asarray(i), steps.shape[1:]) for i in jax.vmap(index_of)(*steps)] if grid else []
    changes = 1 + int(sum(np.any([i[1:] != i[:-1] for i in index], axis=0))) if index else 1
    return changes * math.prod(block.block_aval.shape) * block.array_aval.dtype.itemsize
