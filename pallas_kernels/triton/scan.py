"""The sequential pass: a state stays in registers while all its chunks pass.

With the symbols of `pallas_kernels.gpu.scan`; a program takes some channels of the values of one head.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import triton.language as tl
from jax import Array

from pallas_kernels.triton.launch import Kernel, call

CHUNK = 64
BLOCK = 32  # channels of a value that a program takes: more need more shared memory than an MI300 has, 64 KB
BETA, GATE, START, END = range(4)


class Prepared(NamedTuple):
    """What is known of every chunk before the state is."""

    p: Array  # P, bfloat16 [batch, heads, chunks, 64, 64]
    x: Array  # X, split: bfloat16 [batch, heads, chunks, 2, 64, 64]
    scalars: Array  # beta, the gate in base 2, exp(G), exp(Z): float32 [batch, heads, chunks, 4, 64]


def scan(q: Array, k: Array, v: Array, done: Prepared, state: Array, *, scale: float) -> tuple[Array, Array]:
    """Outputs `[batch, time, heads, value]` and final states `[batch, heads, key, value]`, float32 like the first ones.

    Queries and keys are bfloat16 `[batch, time, key_heads, key]`, values likewise with their heads, whole chunks all.
    """
    batch, time, heads, value = v.shape
    block = min(BLOCK, value)
    o, last = call(
        _scan,
        (value // block, batch * heads),
        (q, k, v, done.p, done.x, done.scalars, state),
        (jax.ShapeDtypeStruct(v.shape, v.dtype), jax.ShapeDtypeStruct(state.shape, jnp.float32)),
        chunks=time // CHUNK,
        heads=heads,
        key_heads=k.shape[2],
        key=k.shape[3],
        value=value,
        block=block,
        chunk=CHUNK,
        scale=scale,
    )
    return o, last


@Kernel
def _tile(pointer, rows: tl.constexpr, columns: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.load(pointer + tl.arange(0, rows)[:, None] * columns + tl.arange(0, columns)[None, :])


@Kernel
def _scan(  # type: ignore[no-untyped-def]
    q,
    k,
    v,
    p,
    x,
    scalars,
    first,
    o,
    last,
    chunks: tl.constexpr,
    heads: tl.constexpr,
    key_heads: tl.constexpr,
    key: tl.constexpr,
    value: tl.constexpr,
    block: tl.constexpr,
    chunk: tl.constexpr,
    scale: tl.constexpr,
):
    batch, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    of_head = tl.program_id(1).to(tl.int64)
    token, channel = tl.arange(0, chunk), tl.arange(0, key)
    column = tl.program_id(0) * block + tl.arange(0, block)
    where = of_head * key * value + channel[:, None] * value + column[None, :]
    state = tl.load(first + where)
    for n in range(chunks):
        time = (batch * chunks + n).to(tl.int64) * chunk + token
        keys = (time * key_heads + head // (heads // key_heads))[:, None] * key + channel[None, :]
        values = (time * heads + head)[:, None] * value + column[None, :]
        here = of_head * chunks + n
        scalar = scalars + here * 4 * chunk
        beta, start, end = (
            tl.load(scalar + token),
            tl.load(scalar + 2 * chunk + token),
            tl.load(scalar + 3 * chunk + token),
        )
        b_k, b_q, old = tl.load(k + keys), tl.load(q + keys), state.to(tl.bfloat16)
        b = tl.load(v + values).to(tl.float32) - tl.dot(b_k, old) * start[:, None]
        high = b.to(tl.bfloat16)
        low = (b - high.to(tl.float32)).to(tl.bfloat16)
        x_high = _tile(x + here * 2 * chunk * chunk, chunk, chunk)
        x_low = _tile(x + (here * 2 + 1) * chunk * chunk, chunk, chunk)
        y = tl.dot(x_low, high, tl.dot(x_high, low, tl.dot(x_high, high))) * beta[:, None]
        read = tl.dot(b_q, old) * (start * scale)[:, None]
        read = tl.dot(_tile(p + here * chunk * chunk, chunk, chunk), y.to(tl.bfloat16), read)
        tl.store(o + values, read.to(tl.bfloat16))
        whole = tl.load(scalar + 3 * chunk - 1)
        state = tl.dot(tl.trans(b_k), (y * end[:, None]).to(tl.bfloat16), state * whole)
    tl.store(last + where, state)
