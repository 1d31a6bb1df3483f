"""The arrays that pass between the kernels, and the key heads that a value head reads."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.typing import DTypeLike

from pallas_kernels.gpu.plan import CHUNK, Plan
from pallas_kernels.gpu.warpgroup import Ref

BETA, GATE, START, END = range(4)


class Tokens(NamedTuple):
    """The inputs of all tokens, padded to whole chunks; keys and values are tuples of the plan's `split`."""

    q: Any  # bfloat16 [batch, time, key_heads * key] each
    k: Any
    v: Any  # [batch, time, heads * value]
    erase: Any  # [batch, time, erase_heads * key]
    gates: Ref  # a gate per channel as it was given, float32 [batch, time, heads * key]
    scalars: Ref  # beta; a gate per head also g in base 2, exp(G), exp(Z): float32 [batch, heads, chunks, kinds, 64]


class Prepared(NamedTuple):
    """What is known of every chunk before the state is; the last four with a gate per channel, in the plan's `split`."""

    p: Any  # P in the plan's `split`, bfloat16 [batch, heads, chunks, 64, 64] each
    x: Ref  # X, split: bfloat16 [batch, heads, chunks, 2, 64, 64]
    a: Any  # A for the backward, in the plan's `parts`
    query_in: Any  # scale exp(G) Q, bfloat16 [batch, time, heads * key] each
    erase_in: Any  # exp(G) E, likewise
    keys_out: Any  # exp(Z) K, likewise
    whole: Ref  # exp(G_64), float32 [batch, heads, chunks, key]


class Operands(NamedTuple):
    """The keys that products with the state take, each of one head: `[64, key]`, or a block of channels."""

    q: Any  # in the plan's `split`
    k: Any
    erase: Any  # None where it is k, or where nothing is erased


def of_chunks(plan: Plan, *shape: int, dtype: DTypeLike = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((plan.batch, plan.heads, plan.chunks, *shape), dtype)


def of_tokens(plan: Plan, width: int, dtype: DTypeLike = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((plan.batch, plan.chunks * CHUNK, plan.heads * width), dtype)


def of_pieces(plan: Plan) -> jax.ShapeDtypeStruct:
    """States as the sequential passes have them, turned."""
    return jax.ShapeDtypeStruct((plan.batch, plan.heads, plan.pieces, plan.value, plan.key), jnp.float32)


def prepared_shapes(plan: Plan, *, for_backward: bool) -> Prepared:
    decayed = (of_tokens(plan, plan.key),) * plan.split if plan.gate == "channel" else None
    return Prepared(
        p=(of_chunks(plan, CHUNK, CHUNK),) * plan.split,
        x=of_chunks(plan, 2, CHUNK, CHUNK) if plan.erases else None,
        a=(of_chunks(plan, CHUNK, CHUNK),) * plan.parts if plan.erases and for_backward else None,
        query_in=decayed,
        erase_in=decayed if plan.erases else None,
        keys_out=decayed,
        whole=of_chunks(plan, plan.key, dtype=jnp.float32) if plan.gate == "channel" else None,
    )


def channels_of(head: Array, width: int, block: int | Array = 0, size: int | None = None) -> pl.Slice:
    """Where a head's channels lie beside those of the others, or one of its blocks of `size`."""
    return pl.ds(head * width, width) if size is None else pl.ds(head * width + block * size, size)


def places_of(arrays: Any, at: Any) -> Any:
    """The same place of every array of a tree."""
    return jax.tree.map(lambda x: x.at[at], arrays)


def keys_of(plan: Plan, tokens: Tokens, batch: Array, head: Array, now: pl.Slice, *block: Any) -> Operands:
    """The keys of a value head as they were given, `now`; of a block of channels `(block, size)`."""
    key_head = lax.div(head, plan.per_key)
    at = (batch, now, channels_of(key_head, plan.key, *block))
    erase: Any = None
    if plan.erase_heads:
        erase_head = lax.div(head, plan.heads // plan.erase_heads)
        erase = places_of(tokens.erase, (batch, now, channels_of(erase_head, plan.key, *block)))
    return Operands(q=places_of(tokens.q, at), k=places_of(tokens.k, at), erase=erase)


def operands_of(plan: Plan, tokens: Tokens, done: Prepared, batch: Array, head: Array, now: pl.Slice) -> Operands:
    """The keys of a value head, decayed to where they meet the state if channels decay apart."""
    if plan.gate != "channel":
        return keys_of(plan, tokens, batch, head, now)
    at = (batch, now, channels_of(head, plan.key))
    return Operands(*(places_of(x, at) for x in (done.query_in, done.keys_out, done.erase_in)))
