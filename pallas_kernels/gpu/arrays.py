"""The arrays that pass between the kernels, and the key heads that a value head reads."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from pallas_kernels.gpu.plan import CHUNK, Plan
from pallas_kernels.gpu.warpgroup import Ref

BETA, GATE, START, END = range(4)


class Tokens(NamedTuple):
    """The inputs of all tokens, padded to whole chunks."""

    q: Ref  # [batch, time, key_heads, key]
    k: Ref
    v: Ref  # [batch, time, heads, value]
    erase: Ref  # [batch, time, erase_heads, key]
    gates: Ref  # a gate per channel as it was given, float32 [batch, time, heads, key]
    scalars: Ref  # beta; a gate per head also g in base 2, exp(G), exp(Z): float32 [batch, heads, chunks, kinds, 64]


class Prepared(NamedTuple):
    """What is known of every chunk before the state is; the last four with a gate per channel."""

    p: Any  # P in the plan's `parts`, in the forward in one: bfloat16 [batch, heads, chunks, 64, 64] each
    x: Ref  # X, split: bfloat16 [batch, heads, chunks, 2, 64, 64]
    a: Any  # A for the backward, likewise
    query_in: Ref  # scale exp(G) Q, bfloat16 [batch, time, heads, key]
    erase_in: Ref  # exp(G) E, likewise
    keys_out: Ref  # exp(Z) K, likewise
    whole: Ref  # exp(G_64), float32 [batch, heads, chunks, key]


class Operands(NamedTuple):
    """The keys that products with the state take, each of one head: `[time, key]`."""

    q: Ref
    k: Ref
    erase: Ref  # None where it is k, or where nothing is erased


def of_chunks(plan: Plan, *shape: int, dtype: DTypeLike = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((plan.batch, plan.heads, plan.chunks, *shape), dtype)


def of_tokens(plan: Plan, width: int, dtype: DTypeLike = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((plan.batch, plan.chunks * CHUNK, plan.heads, width), dtype)


def of_pieces(plan: Plan) -> jax.ShapeDtypeStruct:
    """States as the sequential passes have them, turned."""
    return jax.ShapeDtypeStruct((plan.batch, plan.heads, plan.pieces, plan.value, plan.key), jnp.float32)


def prepared_shapes(plan: Plan, *, for_backward: bool) -> Prepared:
    decayed = of_tokens(plan, plan.key) if plan.gate == "channel" else None
    return Prepared(
        p=(of_chunks(plan, CHUNK, CHUNK),) * (plan.parts if for_backward else 1),
        x=of_chunks(plan, 2, CHUNK, CHUNK) if plan.erases else None,
        a=(of_chunks(plan, CHUNK, CHUNK),) * plan.parts if plan.erases and for_backward else None,
        query_in=decayed,
        erase_in=decayed if plan.erases else None,
        keys_out=decayed,
        whole=of_chunks(plan, plan.key, dtype=jnp.float32) if plan.gate == "channel" else None,
    )


def keys_of(plan: Plan, tokens: Tokens, batch: Array, head: Array) -> Operands:
    """The keys of a value head as they were given."""
    key_head = lax.div(head, plan.per_key)
    erase_head = lax.div(head, plan.heads // plan.erase_heads) if plan.erase_heads else None
    return Operands(
        q=tokens.q.at[batch, :, key_head],
        k=tokens.k.at[batch, :, key_head],
        erase=tokens.erase.at[batch, :, erase_head] if plan.erase_heads else None,
    )


def operands_of(plan: Plan, tokens: Tokens, done: Prepared, batch: Array, head: Array) -> Operands:
    """The keys of a value head, decayed to where they meet the state if channels decay apart."""
    if plan.gate != "channel":
        return keys_of(plan, tokens, batch, head)
    return Operands(
        q=done.query_in.at[batch, :, head],
        k=done.keys_out.at[batch, :, head],
        erase=done.erase_in.at[batch, :, head] if plan.erases else None,
    )
