"""What a warpgroup does: products of tiles in shared memory, vectors along rows and columns, copies, kernels of a grid.

A value lies in the registers of the 128 threads of a warpgroup as the accumulator of a product does; a vector along its
rows or its columns lies as a reduction of it. Operands of a product lie in shared memory as tiles of 8 rows and 128 bytes
(64 where a tile is 32 wide), and the two operands of a product must have the same width of tiles.

How products and copies are done is the machine's that a kernel is traced for; what they mean is the same for all.
"""

import contextvars
import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from pallas_kernels.gpu.machine import Machine

Ref = Any  # Pallas has no public type for references. None where a member or a call has no use for one
WHOLE = plgpu.Layout.WGMMA
INTERPRET: Any = False  # parameters of the GPU interpreter, for tests
MACHINE: contextvars.ContextVar[Machine] = contextvars.ContextVar("the machine that a kernel is traced for")


def shared(*shape: int, dtype: DTypeLike = jnp.bfloat16, swizzle: int = 128) -> Any:
    """Shared memory for operands of products."""
    tiles: Any = plgpu.TilingTransform
    swizzled: Any = plgpu.SwizzleTransform
    return plgpu.SMEM(shape, dtype, transforms=(tiles((8, swizzle // jnp.dtype(dtype).itemsize)), swizzled(swizzle)))


def vectors(*shape: int) -> Any:
    """Shared memory for float32 vectors."""
    return plgpu.SMEM(shape, jnp.float32)


def kernel(
    machine: Machine,
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

    def traced(*references: Any) -> None:
        before = MACHINE.set(machine)
        try:
            body(*references)
        finally:
            MACHINE.reset(before)

    (results,) = plgpu.kernel(
        traced,
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


def read(tile: Any) -> Array:
    """A tile, or the sum of its parts, as float32."""
    loaded = [plgpu.load(ref, layout=WHOLE, optimized=False).astype(jnp.float32) for ref in parts(tile)]
    return functools.reduce(operator.add, loaded)


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


def turned(tile: Any) -> Any:
    """The transpose of a tile, or of its parts."""
    if isinstance(tile, tuple):
        return tuple(map(turned, tile))
    return tile.transpose((1, 0))


def parts(tile: Any) -> Sequence[Any]:
    """The parts of a value that is a sum of bfloat16, the highest first; what is not split is its only one."""
    return tile if isinstance(tile, tuple | list) else (tile,)


def along_first(ref: Ref) -> tuple[Ref, ...]:
    """Parts that lie along the first axis of one reference."""
    return tuple(ref.at[n] for n in range(ref.shape[0]))


def split_of(x: Array, count: int) -> list[Array]:
    """A float32 value as a sum of so many of bfloat16, the highest first; two parts lose 2^-17 of it."""
    if count == 1:
        return [x.astype(jnp.bfloat16)]
    # Rounded as an integer: of a conversion and its reverse the compiler makes slow conversions of single numbers.
    bits = lax.bitcast_convert_type(x, jnp.int32) + jnp.int32(0x8000)
    high = lax.bitcast_convert_type(bits & jnp.int32(-0x10000), jnp.float32)
    return [high.astype(jnp.bfloat16), *split_of(x - high, count - 1)]


def put(tile: Any, x: Array) -> None:
    """Writes a value to a tile, or split to its parts."""
    if not isinstance(tile, tuple):
        tile[...] = x.astype(tile.dtype)
        return
    for ref, part in zip(tile, split_of(x, len(tile)), strict=True):
        ref[...] = part


def put_turned(tile: Any, x: Array) -> None:
    """Writes the transpose of a value of 64 rows."""
    if MACHINE.get().copies == "tma":
        put(turned(tile), x)
        return
    for ref, part in zip(parts(tile), split_of(x, len(parts(tile))), strict=True):
        for start in range(0, x.shape[1], x.shape[0]):  # no instruction of these machines stores a transpose
            block = ref.at[pl.ds(start, x.shape[0])]
            block[...] = lax.slice(part, (0, start), (x.shape[0], start + x.shape[0]))
            block[...] = plgpu.load(turned(block), layout=WHOLE, optimized=False)


Copies = tuple[Any, Any]  # trees of references: from where, to where


def _each(copies: Sequence[Copies]) -> list[tuple[Ref, Ref]]:
    return [pair for copy in copies for pair in zip(*map(jax.tree.leaves, copy), strict=True)]


def load(barrier: Ref, *copies: Copies) -> None:
    """Starts copies from global to shared memory, which arrive at a barrier of so many arrivals."""
    for source, target in _each(copies):
        if MACHINE.get().copies == "tma":
            plgpu.copy_gmem_to_smem(source, target, barrier)
        elif INTERPRET:  # which knows no such copies
            target[...] = source[...]
        elif math.prod(target.shape) % 128 == 0:
            plgpu.copy_gmem_to_smem(source, target, oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS)
        else:  # a vector so short that not every thread has a part of it
            for from_, to in _vectors(source, target):
                to[...] = along_columns(from_)


def loaded(barrier: Ref, then: Callable[[], None] = lambda: None) -> None:
    """Waits until all the copies of a `load` have arrived, and does what shall be under way as soon as can be: other loads.

    Where threads copy for themselves they wait for all that they have begun, and begin `then` after it.
    """
    if MACHINE.get().copies == "tma":
        then()
        plgpu.barrier_wait(barrier)
        return
    if not INTERPRET:
        plgpu.wait_gmem_to_smem(0)
    then()


def store(*copies: Copies, when: Array | None = None) -> None:
    """Starts copies from shared to global memory of what this warpgroup has written; not if `when` is false."""
    tma = MACHINE.get().copies == "tma"
    if tma:
        plgpu.commit_smem()

    def start() -> None:
        for source, target in _each(copies):
            if tma:
                plgpu.copy_smem_to_gmem(source, target)
            elif len(source.shape) == 1 or source.shape[0] < 8:
                for from_, to in _vectors(source, target):
                    to[...] = along_columns(from_)
            else:
                layout = plgpu.Layout.SMEM_GMEM_COPY(source.shape, source.dtype, _swizzle(source))
                target[...] = plgpu.load(source, layout=layout, optimized=False)

    start() if when is None else pl.when(when)(start)


def stored(under_way: int = 0, *, and_written: bool = False) -> None:
    """Waits until shared memory that is being copied from may be written again, or is no longer needed at all.

    The last so many copies that were started may still be under way.
    """
    if MACHINE.get().copies == "tma":
        plgpu.wait_smem_to_gmem(under_way, wait_read_only=not and_written)


def _vectors(*several: Ref) -> list[tuple[Ref, ...]]:
    """The rows of vectors that lie one after another."""
    if len(several[0].shape) == 1:
        return [several]
    return [tuple(x.at[row] for x in several) for row in range(several[0].shape[0])]


def _swizzle(ref: Ref) -> int:
    """Bytes of a row of a tile of `shared`."""
    return min(128, ref.shape[-1] * jnp.dtype(ref.dtype).itemsize)
