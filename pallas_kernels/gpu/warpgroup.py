"""What a warpgroup does on Hopper: products of tiles in shared memory, vectors along rows and columns, kernels of a grid.

A value lies in the registers of the 128 threads of a warpgroup as the accumulator of a product does; a vector along its
rows or its columns lies as a reduction of it. Operands of a product lie in shared memory as tiles of 8 rows and 128 bytes
(64 where a tile is 32 wide), and the two operands of a product must have the same width of tiles.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

Ref = Any  # Pallas has no public type for references. None where a member or a call has no use for one
WHOLE = plgpu.Layout.WGMMA
INTERPRET: Any = False  # parameters of the GPU interpreter, for tests


def shared(*shape: int, dtype: DTypeLike = jnp.bfloat16, swizzle: int = 128) -> Any:
    """Shared memory for operands of products."""
    tiles: Any = plgpu.TilingTransform
    swizzled: Any = plgpu.SwizzleTransform
    return plgpu.SMEM(shape, dtype, transforms=(tiles((8, swizzle // jnp.dtype(dtype).itemsize)), swizzled(swizzle)))


def vectors(*shape: int) -> Any:
    """Shared memory for float32 vectors."""
    return plgpu.SMEM(shape, jnp.float32)


def kernel(
    body: Callable[[Any, Any, Any], None],
    inputs: Any,
    outputs: Any,
    scratch: Any,
    grid: dict[str, int],
    name: str,
    warpgroups: int = 1,
) -> Any:
    """Runs `body(inputs, outputs, scratch)`, trees of references, once for every point of the named grid.

    Programs that differ in the first name of the grid alone run one after another, if not together.
    """
    (results,) = plgpu.kernel(
        body,
        out_type=[outputs],
        scratch_types=[scratch],
        grid=tuple(reversed(grid.values())),
        grid_names=tuple(reversed(grid)),
        num_threads=warpgroups,
        thread_name="warpgroup",
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=INTERPRET,
    )(inputs)
    return results


def place(*names: str) -> tuple[Array, ...]:
    """Where on the grid this program is."""
    return tuple(lax.axis_index(name) for name in names)


def read(ref: Ref) -> Array:
    """A tile, as float32."""
    return plgpu.load(ref, layout=WHOLE, optimized=False).astype(jnp.float32)


def along_rows(ref: Ref) -> Array:
    """A vector with one number a row."""
    return plgpu.load(ref, layout=WHOLE.reduce(1), optimized=False)


def along_columns(ref: Ref) -> Array:
    """A vector with one number a column."""
    return plgpu.load(ref, layout=WHOLE.reduce(0), optimized=False)


def each_row(vector: Array, width: int) -> Array:
    """One number a row, repeated over the columns."""
    return lax.broadcast_in_dim(vector, (vector.shape[0], width), [0])


def each_column(vector: Array, height: int) -> Array:
    """One number a column, repeated over the rows."""
    return lax.broadcast_in_dim(vector, (height, vector.shape[0]), [1])


def zeros(*shape: int) -> Array:
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), WHOLE)


def zero_rows(height: int) -> Array:
    """A vector with one zero a row."""
    return plgpu.layout_cast(jnp.zeros(height, jnp.float32), WHOLE.reduce(1))


def indices(height: int, width: int) -> tuple[Array, Array]:
    """The row and the column of every element."""
    row, column = (plgpu.broadcasted_iota(jnp.int32, (height, width), d, layout=WHOLE) for d in (0, 1))
    return row, column


def turned(ref: Ref) -> Ref:
    """The transpose of a tile."""
    return ref.transpose((1, 0))


Pairs = Sequence[tuple[Ref, Ref]]


def _multiply(accumulators: Sequence[Ref], sums: Sequence[Pairs]) -> None:
    for accumulator, pairs in zip(accumulators, sums, strict=True):
        for a, b in pairs:
            plgpu.wgmma(accumulator, a, b)


def _accumulators(sums: Sequence[Pairs]) -> list[Any]:
    return [plgpu.ACC((pairs[0][0].shape[0], pairs[0][1].shape[1]), jnp.float32) for pairs in sums]


def products(*sums: Pairs) -> list[Array]:
    """Sums of products of pairs of tiles, in float32; all are under way before the first is waited for."""

    def run(*accumulators: Ref) -> list[Array]:
        _multiply(accumulators, sums)
        return [accumulator[...] for accumulator in accumulators]

    return pl.run_scoped(run, *_accumulators(sums))


def products_over[T](
    steps: int, body: Callable[[Array, T], tuple[Sequence[Pairs], T]], carry: T, *shapes: tuple[int, int]
) -> tuple[list[Array], T]:
    """Sums of products of those shapes over several steps; `body(step, carry)` brings the pairs of tiles of a step."""

    def run(*accumulators: Ref) -> tuple[list[Array], T]:
        def step(index: Array, now: T) -> T:
            sums, now = body(index, now)
            _multiply(accumulators, sums)
            plgpu.wgmma_wait(0)
            return now

        end = lax.fori_loop(0, steps, step, carry)
        return [accumulator[...] for accumulator in accumulators], end

    return pl.run_scoped(run, *(plgpu.ACC(shape, jnp.float32) for shape in shapes))


def product(*pairs: tuple[Ref, Ref]) -> Array:
    """The sum of the products of pairs of tiles, in float32."""
    return products(pairs)[0]


class Sum:
    """A sum of products in float32, in registers, to which products are added while other work goes on.

    The left operand of a product may be in registers too: a value of bfloat16, that then needs no shared memory. It may
    not be a mask of the program's own making: ptxas (13.5) has set a register of such a constant after its first use.
    """

    def __init__(self, held: Any) -> None:
        self._held = held  # an accumulator; in the interpreter, which multiplies no values, the sum itself

    def start(self, x: Array) -> None:
        """Begins with a value, not with zero."""
        if INTERPRET:
            self._held = x
        else:
            self._held[...] = x

    def add(self, *pairs: tuple[Any, Ref]) -> None:
        """Starts the products of pairs of tiles, or of a value and a tile."""
        for a, b in pairs:
            if INTERPRET:
                self._held += jnp.dot(a[...].astype(jnp.float32), b[...].astype(jnp.float32))
            else:
                plgpu.wgmma(self._held, a, b)

    def value(self, under_way: int = 0) -> Array:
        """The sum, as soon as no more than the last so many products that were started, of any sum, are under way."""
        return self._held if INTERPRET else plgpu.wgmma_accumulator_load(self._held, wait_n=under_way)


def with_sums[T](body: Callable[..., T], *shapes: tuple[int, int]) -> T:
    """Runs `body` with a `Sum` of zero for every shape."""
    if INTERPRET:
        return body(*(Sum(jnp.zeros(shape, jnp.float32)) for shape in shapes))
    return pl.run_scoped(lambda *held: body(*map(Sum, held)), *(plgpu.ACC(shape, jnp.float32) for shape in shapes))


def put(ref: Ref, x: Array) -> None:
    ref[...] = x.astype(ref.dtype)


def parts(split: Ref) -> Sequence[Ref]:
    """The parts of a value that is a sum of bfloat16, the highest first: a tuple, or the first axis of one reference."""
    return split if isinstance(split, tuple) else [split.at[n] for n in range(split.shape[0])]


def split_of(x: Array, count: int) -> list[Array]:
    """A float32 value as a sum of so many of bfloat16, the highest first; two parts lose 2^-17 of it."""
    if count == 1:
        return [x.astype(jnp.bfloat16)]
    # Rounded as an integer: of a conversion and its reverse the compiler makes slow conversions of single numbers.
    bits = lax.bitcast_convert_type(x, jnp.int32) + jnp.int32(0x8000)
    high = lax.bitcast_convert_type(bits & jnp.int32(-0x10000), jnp.float32)
    return [high.astype(jnp.bfloat16), *split_of(x - high, count - 1)]


def put_split(split: Ref, x: Array) -> None:
    for ref, part in zip(parts(split), split_of(x, len(parts(split))), strict=True):
        ref[...] = part


def read_split(split: Ref) -> Array:
    return functools.reduce(operator.add, map(read, parts(split)))


def split_pairs(a: Ref, b: Ref, *, turn_a: bool = False, turn_b: bool = False) -> list[tuple[Ref, Ref]]:
    """The pairs whose products sum to that of two split values (error 2^-16)."""
    return [
        (turned(x) if turn_a else x, turned(y) if turn_b else y)
        for i, x in enumerate(parts(a))
        for j, y in enumerate(parts(b))
        if i + j < 2
    ]


def load(barrier: Ref, *copies: tuple[Ref, Ref]) -> None:
    """Starts copies `(from global, to shared)`, which arrive at a barrier of so many arrivals."""
    for source, target in copies:
        plgpu.copy_gmem_to_smem(source, target, barrier)


def loaded(barrier: Ref) -> None:
    """Waits until all the copies of a `load` have arrived."""
    plgpu.barrier_wait(barrier)


def store(*copies: tuple[Ref, Ref], when: Array | None = None) -> None:
    """Starts copies `(from shared, to global)` of what this warpgroup has written; not if `when` is false."""
    plgpu.commit_smem()

    def start() -> None:
        for source, target in copies:
            plgpu.copy_smem_to_gmem(source, target)

    start() if when is None else pl.when(when)(start)


def stored(under_way: int = 0, *, and_written: bool = False) -> None:
    """Waits until shared memory that is being copied from may be written again, or is no longer needed at all.

    The last so many copies that were started may still be under way.
    """
    plgpu.wait_smem_to_gmem(under_way, wait_read_only=not and_written)
