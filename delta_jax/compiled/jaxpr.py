"""The Pallas kernels that a jaxpr calls, for TPUs and for GPUs."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Var

_ON_GPU = "mpmd_map"  # a kernel of Mosaic GPU, whose equation has a mesh of its programs


class KernelCall(NamedTuple):
    """A kernel; `steps` are those of its grid, `results` the shapes of its results."""

    name: str
    steps: int
    results: tuple[tuple[int, ...], ...]
    equation: JaxprEqn

    @property
    def bytes(self) -> int:
        """Between a TPU's HBM and VMEM, of all blocks that the grid moves; what the kernel fetches itself moves once.

        On a GPU, where kernels fetch all themselves, arguments and results once, but for those that its body never names.
        """
        if self.equation.primitive.name == _ON_GPU:
            (jaxpr,) = inner_jaxprs(self.equation)
            named = {atom for equation in jaxpr.eqns for atom in equation.invars if isinstance(atom, Var)}
            given = [*self.equation.invars, *self.equation.outvars]
            refs: list[tuple[Any, Any]] = [
                (ref.aval, outer.aval) for ref, outer in zip(jaxpr.invars, given, strict=True) if ref in named
            ]
            # What is given as a reference, such as a state that is updated in place, is read and written.
            return sum(
                math.prod(aval.shape) * aval.dtype.itemsize * (1 + hasattr(outer, "inner_aval")) for aval, outer in refs
            )
        mapping = self.equation.params["grid_mapping"]
        return sum(block_bytes(block, mapping.grid) for block in mapping.block_mappings)

    @property
    def threads(self) -> int:
        """Threads of a program on a GPU."""
        return 128 * sum(mesh.num_threads or 1 for mesh in self.equation.params["meshes"])

    @property
    def loops(self) -> tuple[int, tuple["Loop", ...]]:
        """Of a kernel on a GPU: multiply-adds of a program outside of loops, and the loops that multiply."""
        parts = [_loops_of(jaxpr) for jaxpr in inner_jaxprs(self.equation)]
        return sum(own for own, _ in parts), tuple(loop for _, loops in parts for loop in loops)

    def steps_over(self, cores: int) -> int:
        """Steps that each of several cores of a device takes: the longest axis that is parallel is cut over them."""
        grid = self.equation.params["grid_mapping"].grid
        options = self.equation.params["compiler_params"]
        options = options.get("mosaic_tpu", options) if isinstance(options, Mapping) else options
        semantics = getattr(options, "dimension_semantics", None) or ("arbitrary",) * len(grid)
        longest = max((n for n, kind in zip(grid, semantics, strict=True) if str(kind) == "parallel"), default=1)
        return self.steps // longest * -(-longest // cores)


class Loop(NamedTuple):
    """A loop that multiplies: how often it runs, multiply-adds of a turn outside of inner loops, and these."""

    trips: int
    own: int
    inner: tuple["Loop", ...]

    @property
    def once(self) -> int:
        """Multiply-adds that its body spells out, those inside inner loops once."""
        return self.own + sum(loop.once for loop in self.inner)

    @property
    def total(self) -> int:
        """Multiply-adds of all turns."""
        return self.trips * (self.own + sum(loop.total for loop in self.inner))


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
    """Every kernel of a jaxpr in order, also inside the functions it calls; one without a name has theirs.

    What a flag alone decides, a loop that runs in no ordinary step, is left out.
    """
    for equation in open_jaxpr(jaxpr).eqns:
        if equation.primitive.name in ("pallas_call", _ON_GPU):
            grid = grid_of(equation)
            results: list[Any] = [result.aval for result in equation.outvars]
            shapes = tuple(tuple(aval.shape) for aval in results)
            yield KernelCall(equation.params["name"] or scope, math.prod(grid), shapes, equation)
            continue
        if equation.primitive.name == "while" and not equation.params["cond_jaxpr"].eqns:
            continue
        for inner in inner_jaxprs(equation):
            yield from kernel_calls(inner, equation.params.get("name") or scope)


def grid_of(equation: JaxprEqn) -> tuple[int, ...]:
    """The sizes of a kernel's grid."""
    if equation.primitive.name == _ON_GPU:
        return tuple(equation.params["meshes"][0].grid)
    return tuple(equation.params["grid_mapping"].grid)


def tile_multiply_adds(equation: JaxprEqn) -> int:
    """Of a product of tiles in a kernel for GPUs; 0 where the equation is none."""
    if equation.primitive.name not in ("wgmma_ref", "wgmma", "mma"):
        return 0
    shapes = _operand_shapes(equation)
    return math.prod(shapes[0]) * shapes[1][1]


def _operand_shapes(equation: JaxprEqn) -> list[tuple[int, ...]]:
    """Shapes of an accumulator and both operands, each after what is done to its reference."""
    avals: list[Any] = [atom.aval for atom in equation.invars]
    shapes, leaves = [], avals[3:]
    for aval, name in zip(avals, ("acc", "a", "b"), strict=False):
        tree = equation.params.get(f"{name}_transforms_tree")
        if tree is not None:
            for transform in tree.unflatten(leaves[: tree.num_leaves]):
                aval = transform.transform_type(aval)
            leaves = leaves[tree.num_leaves :]
        shapes.append(tuple(aval.shape))
    return shapes


def _loops_of(jaxpr: Jaxpr) -> tuple[int, tuple[Loop, ...]]:
    """Multiply-adds of tiles outside of loops, every branch counted, and the loops that multiply."""
    own, loops = 0, []
    for equation in jaxpr.eqns:
        own += tile_multiply_adds(equation)
        for inner in inner_jaxprs(equation):
            of_inner = _loops_of(inner)
            if equation.primitive.name == "scan" and of_inner != (0, ()):
                loops.append(Loop(equation.params["length"], *of_inner))
            elif equation.primitive.name == "while" and of_inner != (0, ()):
                raise ValueError("a kernel multiplies in a loop whose turns only its run decides")
            else:
                own += of_inner[0]
                loops += of_inner[1]
    return own, tuple(loops)


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
