"""The pass of a state through all chunks: it stays in registers while one chunk after the other changes it.

Of every chunk it is known what it does to a state, S' = M S + N (`delta_jax.ops.transitions` derives it). A program takes
some channels of the values of one head, and reads M by tiles. The cotangent of the state passes the other way, through M^T.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import triton.language as tl
from jax import Array
from jax.typing import DTypeLike
from triton.backends.compiler import GPUTarget

from pallas_kernels.batching import joins_batch
from pallas_kernels.triton.launch import Kernel, call, target

# A tile of M is square, and a product needs 16 rows. A state of as many keys as these, and the next one, fit into registers.
LEAST, TILE, MOST_KEYS = 16, 64, 256


class Plan(NamedTuple):
    """How the kernel is cut, and how precise its products are."""

    tile: int  # of keys
    block: int  # of values, those of a program
    precision: str  # as `tl.dot` names it
    stages: int  # chunks in shared memory at once, of which all but one are loaded ahead


def plan(target: GPUTarget | None, key: int, value: int, *, exact: bool) -> Plan:
    """What suits a GPU; where there is none, as of NVIDIA.

    Every warp holds a block of the state, in NVIDIA's registers twice where float32 is three products: a block of 32 values
    for keys of 128. These are as many programs as a GPU of NVIDIA runs at once for 32 heads, and AMD's have twice the
    processors. Shared memory holds M of two chunks for keys of up to 128, but no more than a tile where it has 64 KB.
    """
    tile = min(TILE, _sized(key))
    if target is not None and target.backend == "hip":
        return Plan(tile, LEAST, "ieee", 1)
    block = 32 * 2 * TILE // max(2 * TILE, _sized(key)) // (2 if exact else 1)
    return Plan(tile, min(block, _sized(value)), "tf32x3" if exact else "tf32", 1 if key > 2 * TILE else 2)


def unsupported(q: Array, v: Array) -> str | None:
    """Why the kernel cannot take queries and values of these shapes and dtypes; None if it can."""
    if v.dtype == jnp.float64:
        return "the Triton kernel takes float32, bfloat16 and float16, not float64"
    if q.shape[-1] > MOST_KEYS:
        return f"the Triton kernel takes key sizes up to {MOST_KEYS}, not {q.shape[-1]}"
    if not all(isinstance(size, int) for size in v.shape):
        return f"the Triton kernel takes sizes that are numbers, not {', '.join(map(str, v.shape))}"
    return None


def states_before(
    maps: tuple[Any, ...], state: Array, to: DTypeLike | None = None, *, backwards: bool = False
) -> tuple[Array, Array]:
    """The state before every chunk, `[chunks, batch, heads, key, value]`, and the one after them all.

    Args:
      maps: M, `[chunks, batch, heads, key, key]` or a diagonal `[chunks, batch, heads, key or 1, 1]`, and N, shaped as the
        states; float32 like all here.
      state: the state before them all, `[batch, heads, key, value]`.
      to: the dtype as precise as which products are: float32, or float16 for less, TF32 where there is such.
      backwards: whether it goes through M^T from the last chunk to the first; the state "before" a chunk then is the
        cotangent of the one after it.
    """
    mapped = joins_batch(partial(_of_batch, exact=jnp.dtype(to) == jnp.float32, backwards=backwards))
    before, end = mapped(*(jnp.swapaxes(x, 0, 1) for x in maps[:2]), state)
    return jnp.swapaxes(before, 0, 1), end


def _of_batch(transitions: Array, left: Array, state: Array, *, exact: bool, backwards: bool) -> tuple[Array, Array]:
    transitions, left = (jnp.swapaxes(x, 0, 1) for x in (transitions, left))
    chunks, batch, heads, key, value = left.shape
    diagonal = transitions.shape[-1] == 1
    if diagonal:
        transitions = jnp.broadcast_to(transitions, (*left.shape[:-1], 1))
    tile, block, precision, stages = plan(target(), key, value, exact=exact)
    before, end = call(
        _pass,
        (-(-value // block) * batch * heads,),
        (transitions, left, state),
        (jax.ShapeDtypeStruct(left.shape, left.dtype), jax.ShapeDtypeStruct(state.shape, state.dtype)),
        stages=stages,
        chunks=chunks,
        key=key,
        value=value,
        tile=tile,
        block=block,
        diagonal=diagonal,
        backwards=backwards,
        precision=precision,
    )
    return jnp.swapaxes(before, 0, 1), end


def _sized(size: int) -> int:
    """The least power of two that is not below, and which a product takes."""
    return max(LEAST, 1 << (size - 1).bit_length())


@Kernel
def _pass(  # type: ignore[no-untyped-def]
    transitions,
    left,
    first,
    before,
    end,
    chunks: tl.constexpr,
    key: tl.constexpr,
    value: tl.constexpr,
    tile: tl.constexpr,
    block: tl.constexpr,
    diagonal: tl.constexpr,
    backwards: tl.constexpr,
    precision: tl.constexpr,
):
    blocks: tl.constexpr = (value + block - 1) // block
    head, heads = (tl.program_id(0) // blocks).to(tl.int64), tl.num_programs(0) // blocks
    row, column = tl.arange(0, tile), tl.program_id(0) % blocks * block + tl.arange(0, block)
    parts: tl.constexpr = (key + tile - 1) // tile
    state = ()
    for i in tl.static_range(parts):
        here = (i * tile + row)[:, None]
        inside = (here < key) & (column[None, :] < value)
        part = tl.load(first + head * key * value + here * value + column[None, :], mask=inside, other=0.0)
        state = state + (part,)  # type: ignore[assignment]  # noqa: RUF005
    for n in range(chunks):
        chunk = (chunks - 1 - n if backwards else n) * heads + head
        after = ()
        for i in tl.static_range(parts):
            here = (i * tile + row)[:, None]
            inside = (here < key) & (column[None, :] < value)
            where = chunk * key * value + here * value + column[None, :]
            tl.store(before + where, state[i], mask=inside)
            part = tl.load(left + where, mask=inside, other=0.0)
            if diagonal:
                part += tl.load(transitions + chunk * key + here, mask=here < key, other=0.0) * state[i]
            else:
                for j in tl.static_range(parts):
                    other = (j * tile + row)[None, :]
                    entry = other * key + here if backwards else here * key + other
                    found = (here < key) & (other < key)
                    m = tl.load(transitions + chunk * key * key + entry, mask=found, other=0.0)
                    part = tl.dot(m, state[j], part, input_precision=precision)
            after = after + (part,)  # type: ignore[assignment]  # noqa: RUF005
        state = after
    for i in tl.static_range(parts):
        here = (i * tile + row)[:, None]
        inside = (here < key) & (column[None, :] < value)
        tl.store(end + head * key * value + here * value + column[None, :], state[i], mask=inside)
