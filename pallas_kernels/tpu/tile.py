"""The arrays of a tile of 128 tokens of several heads: what goes in, and what its stages pass on, all in VMEM.

Shapes are those of one tile, as a stage sees it; the symbols are those of `pallas_kernels.tpu.forward`. Members are
None where a plan (`pallas_kernels.tpu.plan`) has no use for them.
"""

import itertools
from collections.abc import Callable, Generator, Iterable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from pallas_kernels.tpu import inverse, scores
from pallas_kernels.tpu.plan import Plan
from pallas_kernels.tpu.products import TILE, transposed

HALF = TILE // 2
Ref = Any  # Pallas has no public type for references. None where a member or a call has no use for one
type Stages[T] = Generator[None, None, T]  # stops after every head of a stage, so that `in_turns` can mix two


def in_turns(*stages: Iterable[None]) -> None:
    """Emits stages a head at a time in turns, the first ones first: the compiler does not reach across whole stages."""
    for _ in itertools.zip_longest(*stages):
        pass


def finished[T](stages: Stages[T]) -> T:
    """Emits stages one after another; returns what they return."""
    while True:
        try:
            next(stages)
        except StopIteration as end:
            return end.value


class Tokens(NamedTuple):
    """The inputs of a tile, heads side by side on the lanes; in `backward` their cotangents, laid out likewise."""

    q: Ref  # [128, key_heads * key]
    k: Ref  # likewise
    v: Ref  # [128, heads * value]
    erase: Ref  # [128, erase_heads * key]
    g: Ref  # a gate per channel, [128, heads * key]
    scalars: Ref  # float32 [kinds * heads, 128], a row for every head of a kind: `scalar_row`


class LevelFactors(NamedTuple):
    """A gate per channel: the decays by which the forward multiplied, kept for the backward; float32 `[128, key]` a head."""

    levels: Ref  # [heads, 7, 128, key], to be addressed by the methods
    start: Ref  # exp(G): [heads, 128, key]
    end: Ref  # exp(Z), likewise

    def level(self, head: int, block: int) -> Ref:
        """`scores.level_factor` of a level; of a gentle tile there are none but those of `scores.FAR_BLOCKS`."""
        return self.levels.at[head, scores.BLOCKS.index(block)]

    def near_rows(self, head: int) -> Ref:
        """`scores.near_factors` on queries and erase keys: of a gentle tile, in the room of its first level."""
        return self.level(head, 1)

    def near_keys(self, head: int) -> Ref:
        """Likewise on keys, in the room of the second."""
        return self.level(head, 2)


class Prepared(NamedTuple):
    """What a tile needs besides the state; the leading axis counts value heads."""

    a: Ref  # A, float32 [heads, 128, 128]
    p: Ref  # P, float32 [heads, 128, 128]
    x: Ref  # the inverses of the two diagonal blocks of I + A diag(b), side by side, float32 [heads, 64, 128]
    keys: Ref  # ((exp(Z) K)^T diag(b)), [heads, key, 128]
    decay: Ref  # exp(G_i - G_j), a gate per head: float32 [heads, 128, 128]
    start: Ref  # exp(G), likewise, the same on all lanes
    erase_in: Ref  # exp(G) E, a gate per channel: [heads, 128, key]
    query_in: Ref  # exp(G) Q, likewise
    whole: Ref  # exp(G_128) as a row, likewise: float32 [heads, 8, key]
    factors: Any  # `LevelFactors`, likewise, for the backward


class TileScratch(NamedTuple):
    """Scratch between the stages of `pallas_kernels.tpu.prepare`, float32."""

    lower_columns: Ref  # `inverse.base_columns` of rows 8 to 15 of every block of 16: [heads, 15, 8, 128]
    upper_columns: Ref  # likewise of rows 0 to 7: [heads, 7, 8, 128]
    inverse_16: Ref  # the inverses of the eight blocks of 16, side by side: [heads, 16, 128]
    inverse_32: Ref  # those of the four blocks of 32: [heads, 32, 128]
    crossing: Ref  # A21 X11 of two heads, in as many rows as a block has: [pairs of heads, 32, 128]
    before: Ref  # a gate per channel: sums of the gates of a token's block of the level, up to it: [heads, 128, key]
    after: Ref  # likewise, of those that follow it


def operand(plan: Plan) -> jnp.dtype:
    """The dtype of what is only ever an operand of a product."""
    return jnp.dtype(jnp.float32 if plan.exact else jnp.bfloat16)


def prepared_shapes(plan: Plan, *, inverts: bool) -> Prepared:
    """VMEM for one tile; for the backward, which does not invert, with the `factors`."""

    def vmem(*shape: int, dtype: DTypeLike = jnp.float32) -> object:
        return pltpu.VMEM((plan.heads, *shape), dtype)

    channel, square, wide = plan.gate == "channel", (TILE, TILE), (TILE, plan.key)
    decayed = vmem(*wide, dtype=operand(plan)) if channel else None
    levels = LevelFactors(vmem(len(scores.BLOCKS), *wide), vmem(*wide), vmem(*wide))
    return Prepared(
        a=vmem(*square) if plan.erases else None,
        p=vmem(*square),
        x=vmem(HALF, TILE) if plan.erases and inverts else None,
        keys=vmem(plan.key, TILE, dtype=operand(plan)),
        decay=vmem(*square) if plan.gate == "head" else None,
        start=vmem(*square) if plan.gate == "head" else None,
        erase_in=decayed if plan.erases else None,
        query_in=decayed,
        whole=vmem(8, plan.key) if channel else None,
        factors=levels if channel and not inverts else None,
    )


def tile_scratch_shapes(plan: Plan, *, inverts: bool) -> TileScratch:
    def vmem(count: int, *shape: int) -> object:
        return pltpu.VMEM((count, *shape), jnp.float32)

    sums = vmem(plan.heads, TILE, plan.key) if plan.gate == "channel" else None
    if not inverts:
        return TileScratch(None, None, None, None, None, sums, sums)
    return TileScratch(
        lower_columns=vmem(plan.heads, inverse.LOWER_COLUMNS, 8, TILE),
        upper_columns=vmem(plan.heads, inverse.UPPER_COLUMNS, 8, TILE),
        inverse_16=vmem(plan.heads, 16, TILE),
        inverse_32=vmem(plan.heads, 32, TILE),
        crossing=vmem(-(-plan.heads // 2), 32, TILE),
        before=sums,
        after=sums,
    )


def key_of(plan: Plan, head: int) -> int:
    return head // plan.per_key


def of_key(plan: Plan, ref: Ref, head: int) -> Array:
    """The query or key of a value head, `[128, key]`."""
    return of_head(ref, key_of(plan, head), plan.key)


def erase_of(plan: Plan, tokens: Tokens, head: int) -> Array:
    """The erase key of a value head, `[128, key]`."""
    if tokens.erase is None:
        return of_key(plan, tokens.k, head)
    return of_head(tokens.erase, head * plan.erase_heads // plan.heads, plan.key)


def of_head(ref: Ref, head: int, size: int) -> Array:
    """What lies on the lanes of a head, `[128, size]`."""
    return ref[:, head * size : (head + 1) * size]


# The kinds of token scalars: beta; with a gate per head also g in base 2, exp(G) and exp(Z).
BETA, GATE, START, END = range(4)


def scalar_row(plan: Plan, tokens: Tokens, kind: int, head: int) -> Array:
    """A token scalar of a head, `[1, 128]`."""
    return tokens.scalars[pl.ds(kind * plan.heads + head, 1)]


def start_columns(plan: Plan, tokens: Tokens) -> Array:
    """exp(G) of every head as columns, `[128, >= heads]`."""
    return transposed(tokens.scalars[START * plan.heads : (START + 1) * plan.heads])


def start_of(done: Prepared, head: int, width: int) -> Array:
    """exp(G) of a gate per head over so many lanes, `[128, width]`."""
    return jnp.concatenate([done.start[head]] * -(-width // TILE), 1)[:, :width]


def if_steep(plan: Plan, steep: Array, then: Callable[[], None], otherwise: Callable[[], None]) -> None:
    """Runs one of two stages."""
    if plan.only_steep is not False:
        pl.when(steep)(then)
    if plan.only_steep is not True:
        pl.when(jnp.logical_not(steep))(otherwise)
