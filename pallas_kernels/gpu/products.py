"""Products of tiles, and sums of them in the registers of a warpgroup.

Hopper's "wgmma" multiplies tiles of shared memory, the left one of registers too, beside what the threads do, and adds to an
accumulator that is read when the products are done. "mma" multiplies registers, on the spot. The GPU interpreter multiplies
references alone, so there a product is one of values, too.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu import warpgroup as wg
from pallas_kernels.gpu.registers import moved
from pallas_kernels.gpu.warpgroup import Ref

OPERAND = 64  # rows and columns of a right operand in registers at a time: what a tile of shared memory has
# Of tiles or values; of split ones those products count that are not below the last parts.
Pairs = Sequence[tuple[Any, Any]]


def commit() -> None:
    """What was written to shared memory may be an operand of products."""
    if not _in_registers():
        plgpu.commit_smem()


def _in_registers() -> bool:
    """Whether products are values: "mma", which ends where it begins; and in the interpreter, which multiplies no values."""
    return bool(wg.INTERPRET) or wg.MACHINE.get().products == "mma"


def _multiplied(total: Array, a: Any, b: Ref) -> Array:
    """A sum and a product more, of values or tiles on the left and tiles on the right."""
    if wg.INTERPRET:
        return total + jnp.dot(a[...].astype(jnp.float32), b[...].astype(jnp.float32))
    (height, depth), width = a.shape, b.shape[1]
    deep, wide = min(depth, OPERAND), min(width, OPERAND)
    lefts = [_left(a, start, deep) for start in range(0, depth, deep)]
    columns = []
    for column in range(0, width, wide):
        found = total if width == wide else lax.slice(total, (0, column), (height, column + wide))
        for n, left in enumerate(lefts):
            right = b if (depth, width) == (deep, wide) else b.at[pl.ds(n * deep, deep), pl.ds(column, wide)]
            right = plgpu.load(right, layout=plgpu.Layout.MMA_RHS(jnp.bfloat16), optimized=False)
            found = plgpu.mma(found, left, right)
        columns.append(found)
    return jnp.concatenate(columns, 1) if len(columns) > 1 else columns[0]


def _left(a: Any, start: int, depth: int) -> Array:
    """So many columns of a left operand."""
    layout = plgpu.Layout.MMA_LHS(jnp.bfloat16)
    if not isinstance(a, Array) or hasattr(jax.typeof(a), "inner_aval"):
        part = a if a.shape[1] == depth else a.at[:, pl.ds(start, depth)]
        return plgpu.load(part, layout=layout, optimized=False)
    part = a if a.shape[1] == depth else lax.slice(a, (0, start), (a.shape[0], start + depth))

    @plgpu.inline_mgpu(arg_types=(wg.WHOLE,), return_type=plgpu.ShapeDtypeStruct(part.shape, part.dtype, layout=layout))
    def as_left(_: Any, value: Any) -> Any:
        return moved(value, layout.to_mgpu())

    return as_left(plgpu.layout_cast(part, wg.WHOLE))


def products(*sums: Pairs) -> list[Array]:
    """Sums of products of pairs of tiles, in float32; all are under way before the first is waited for."""

    def run(*totals: Sum) -> list[Array]:
        for total, pairs in zip(totals, sums, strict=True):
            total.add(*pairs)
        later = [sum(len(_products_of(pairs)) for pairs in sums[n + 1 :]) for n in range(len(sums))]
        return [total.value(under_way=count) for total, count in zip(totals, later, strict=True)]

    firsts = [_products_of(pairs)[0] for pairs in sums]
    return with_sums(run, *((a.shape[0], b.shape[1]) for a, b in firsts))


def products_over[T](
    steps: int, body: Callable[[Array, T], tuple[Sequence[Pairs], T]], carry: T, *shapes: tuple[int, int]
) -> tuple[list[Array], T]:
    """Sums of products of those shapes over several steps; `body(step, carry)` brings the pairs of tiles of a step."""

    def run(*totals: Sum) -> tuple[list[Array], T]:
        def step(index: Array, now: tuple[list[Array], T]) -> tuple[list[Array], T]:
            values, inner = now
            sums, inner = body(index, inner)
            for n, (total, pairs) in enumerate(zip(totals, sums, strict=True)):
                if values:
                    total.start(values[n])
                total.add(*pairs)
            if not values:
                plgpu.wgmma_wait(0)
            return [total.value() for total in totals] if values else [], inner

        carried = [total.value() for total in totals] if _in_registers() else []  # accumulators need not be carried
        values, end = lax.fori_loop(0, steps, step, (carried, carry))
        return values or [total.value() for total in totals], end

    return with_sums(run, *shapes)


def _products_of(pairs: Pairs) -> list[tuple[Any, Ref]]:
    """Those of the parts, whose sum is that of split values to the last of the parts."""
    return [
        (x, y)
        for a, b in pairs
        for i, x in enumerate(wg.parts(a))
        for j, y in enumerate(wg.parts(b))
        if i + j < max(len(wg.parts(a)), len(wg.parts(b)))
    ]


def product(*pairs: tuple[Any, Any]) -> Array:
    """The sum of the products of pairs of tiles, in float32."""
    return products(pairs)[0]


class Sum:
    """A sum of products in float32, in registers, to which products are added while other work goes on.

    The left operand of a product may be in registers too: a value of bfloat16, that then needs no shared memory. It may
    not be a mask of the program's own making: ptxas (13.5) has set a register of such a constant after its first use.
    """

    def __init__(self, held: Any) -> None:
        self._held = held  # an accumulator of "wgmma", else the sum itself

    def start(self, x: Array) -> None:
        """Begins with a value, not with zero."""
        if _in_registers():
            self._held = x
        else:
            self._held[...] = x

    def add(self, *pairs: tuple[Any, Ref]) -> None:
        """Starts the products of pairs of tiles, or of a value and a tile."""
        for a, b in _products_of(pairs):
            if _in_registers():
                self._held = _multiplied(self._held, a, b)
            else:
                plgpu.wgmma(self._held, a, b)

    def value(self, under_way: int = 0) -> Array:
        """The sum, as soon as no more than the last so many products that were started, of any sum, are under way."""
        return self._held if _in_registers() else plgpu.wgmma_accumulator_load(self._held, wait_n=under_way)


def with_sums[T](body: Callable[..., T], *shapes: tuple[int, int]) -> T:
    """Runs `body` with a `Sum` of zero for every shape."""
    if _in_registers():
        return body(*(Sum(wg.zeros(*shape)) for shape in shapes))
    return pl.run_scoped(lambda *held: body(*map(Sum, held)), *(plgpu.ACC(shape, jnp.float32) for shape in shapes))
