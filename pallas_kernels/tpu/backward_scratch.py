"""What the stages of the backward pass of a tile share: the scratch between them, and sums over heads that share a key."""

from typing import Literal, NamedTuple, Self

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from pallas_kernels.tpu import scores
from pallas_kernels.tpu.plan import Plan
from pallas_kernels.tpu.products import TILE
from pallas_kernels.tpu.tile import (
    HALF,
    Prepared,
    Ref,
    TileScratch,
    Tokens,
    of_head,
    operand,
    prepared_shapes,
    tile_scratch_shapes,
)

FAR_TERMS = (*scores.FAR_BLOCKS, "reads", "writes")


class Stash(NamedTuple):
    """What the way forwards leaves of a tile: made again, and kept (`pallas_kernels.tpu.forward.Kept`)."""

    prepared: Prepared  # with its `factors`
    states: Ref  # before the tile, as an operand, [heads, key, value]
    y: Ref  # Y, likewise, [heads, 128, value]; None without erasing

    def y_of(self, plan: Plan, tokens: Tokens, head: int) -> Array:
        return of_head(tokens.v, head, plan.value) if self.y is None else self.y[head]


class BackwardScratch(NamedTuple):
    """What is turned is transposed, an operand has the dtype of `tile.operand`, terms are factor * d_factor.

    What takes the room of something that is no longer wanted is a property: VMEM decides how many heads a grid step takes.
    """

    tile: TileScratch
    prepared: Prepared  # with its `factors`, without `x`
    solve: Ref  # dY, solved in place: float32 [heads, 128, value]
    d_o: Ref  # dO times the scale, operand [heads, 128, value]
    d_b: Ref  # dB, likewise; of what is `parted` the second part follows below the first
    weights_turned: Ref  # (P diag(b))^T, operand [heads, 128, 128], likewise
    keys_turned: Ref  # a gate per channel: b exp(Z) K, operand [heads, 128, key]
    x_turned: Ref  # the inverses of the two diagonal blocks, one below the other, float32 [heads, 128, 64]
    corner_turned: Ref  # the block of A diag(b) left below them, float32 [heads, 64, 64]
    raw_p: Ref  # dO Y^T, before masks, decays and beta, float32 [heads, 128, 128]
    raw_a: Ref  # dB Y^T, likewise
    pair_terms: Ref  # a gate per head: those of pairs of tokens, float32 [heads, 128, 128]
    pair_sums: Ref  # likewise: those of a row right of each token, float32 [heads, 128, 128]
    d_p: Ref  # the cotangents of the scores before decays, operand [heads, 128, 128]
    d_a: Ref  # likewise
    d_scores_turned: Ref  # not a gate per channel: dP^T, and dA^T right of it, operand [heads, 128, 128 or 256]
    query_reads: Ref  # dO S^T, float32 [heads, 128, key]
    erase_reads: Ref  # dB S^T, likewise; without erasing only the room
    reads_turned: Ref  # (exp(G) Q)^T, and -(exp(G) E)^T right of it, operand [heads, key, 128 or 256]
    d_q: Ref  # float32 [key heads, 128, key]
    d_k: Ref  # likewise
    d_erase: Ref  # float32 [erase heads, 128, key]
    near_terms: Ref  # a gate per channel, steep tiles: those of the near levels, operand [heads, 4 * 128, key]
    far_terms: Ref  # a gate per channel: those of `FAR_TERMS` one below the other, operand [heads, 5 * 128, key]
    d_near: Ref  # a gate per channel: what pairs inside 16 tokens give to gates, float32 [heads, 128, key]
    d_whole: Ref  # a gate per channel: what exp(G_128) gives to gates, the same in all rows, float32 [heads, 8, key]

    @property
    def read_terms(self) -> Ref:
        """Those of the reads from the state, in place of `query_reads`."""
        return self.query_reads

    @property
    def writes(self) -> Ref:
        """Y dS'^T, in place of `erase_reads`."""
        return self.erase_reads

    @property
    def write_terms(self) -> Ref:
        """Those of the writes to the state, in place of `writes`."""
        return self.writes

    def terms(self, head: int, kind: int | Literal["reads", "writes"]) -> Ref:
        """Where the terms of a level, or of reads or writes, lie: `[128, key]`."""
        near = kind in scores.NEAR_BLOCKS
        place = (scores.NEAR_BLOCKS if near else FAR_TERMS).index(kind) * TILE
        return (self.near_terms if near else self.far_terms).at[head, pl.ds(place, TILE)]

    @classmethod
    def shapes(cls, plan: Plan) -> Self:
        channel, head, reads = plan.gate == "channel", plan.gate == "head", 1 + plan.erases

        def each(*shape: int, dtype: DTypeLike = jnp.float32, count: int = plan.heads) -> object:
            return pltpu.VMEM((count, *shape), dtype)

        def operands(*shape: int) -> object:
            return each(*shape, dtype=operand(plan))

        parts = 2 if parted(plan) else 1
        keys, pairs = each(TILE, plan.key), each(TILE, TILE)
        return cls(
            tile=tile_scratch_shapes(plan, inverts=False),
            prepared=prepared_shapes(plan, inverts=False),
            solve=each(TILE, plan.value),
            d_o=operands(TILE, plan.value),
            d_b=operands(parts * TILE, plan.value),
            weights_turned=operands(parts * TILE, TILE),
            keys_turned=operands(TILE, plan.key) if channel else None,
            x_turned=each(TILE, HALF) if plan.erases else None,
            corner_turned=each(HALF, HALF) if plan.erases else None,
            raw_p=pairs,
            raw_a=pairs if plan.erases else None,
            pair_terms=pairs if head else None,
            pair_sums=pairs if head else None,
            d_p=operands(TILE, TILE),
            d_a=operands(TILE, TILE) if plan.erases else None,
            d_scores_turned=None if channel else operands(TILE, reads * TILE),
            query_reads=keys,
            erase_reads=keys,
            reads_turned=operands(plan.key, reads * TILE),
            d_q=each(TILE, plan.key, count=plan.key_heads),
            d_k=each(TILE, plan.key, count=plan.key_heads),
            d_erase=each(TILE, plan.key, count=plan.erase_heads) if plan.erase_heads else None,
            near_terms=operands(len(scores.NEAR_BLOCKS) * TILE, plan.key) if channel else None,
            far_terms=operands(len(FAR_TERMS) * TILE, plan.key) if channel else None,
            d_near=keys if channel else None,
            d_whole=each(8, plan.key) if channel else None,
        )


def parted(plan: Plan) -> bool:
    """Whether P and dB are taken in two parts, as are the terms that are summed into the gradient of a gate per head."""
    return plan.gate == "head" and not plan.exact


def reads_of(plan: Plan, query: Ref, erase: Ref, head: int) -> Array:
    """What belongs to the queries of a head and, below it, to its erase keys."""
    return jnp.concatenate([query[head], erase[head]], 0) if plan.erases else query[head]


def add(plan: Plan, ref: Ref, head: int, x: Array, *, start: bool = True, block: int = 1) -> None:
    """Adds what a value head gives to its key head (or erase head); with `start` the first of a key head overwrites.

    `x` holds the `right_rows` of a level.
    """
    index = head * ref.shape[0] // plan.heads
    first = start and head * ref.shape[0] % plan.heads == 0
    for here, there in scores.right_pieces(block):
        ref[index, there] = x[here] if first else ref[index, there] + x[here]


def add_erase(plan: Plan, scratch: BackwardScratch, head: int, x: Array, *, start: bool, block: int = 1) -> None:
    """Adds to the cotangent of the erase key; where the write key erases, to that of the write key, never first."""
    if scratch.d_erase is None:
        add(plan, scratch.d_k, head, x, start=False, block=block)
    else:
        add(plan, scratch.d_erase, head, x, start=start, block=block)
