"""How the work is cut: heads and tiles a grid step, from the shapes alone; and what is not supported."""

import dataclasses
from typing import Literal

import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.inputs import Inputs
from pallas_kernels.tpu.products import TILE

SIZES = (64, 128, 192, 256, 384, 512)
MAX_GROUP = 4
FEW_HEADS, MAX_HEADS = 4, 8  # fewer leave a step waiting for its products; more gain nothing, and compile longer
FEW_TILES, FEW_EXACT_TILES = 12, 32  # fewer cost more by the turn that only prepares than preparing ahead gives
WIDE_HEADS = 13  # what a step takes of heads that cannot be cut into so many: 10 of odd sizes, 11, 13, 22
_MOST_HEADS = 32  # the loop over heads is unrolled


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static choices of a call. A grid step handles `group` tiles of 128 tokens of `heads` value heads."""

    batch: int
    key_heads: int  # a grid step
    heads: int  # value heads a grid step
    programs: int  # grid steps to cover all heads
    group: int  # tiles a grid step
    groups: int  # grid steps to cover all tokens
    key: int
    value: int
    gate: Literal["none", "head", "channel"]
    erase_heads: int  # heads of an erase key of its own a grid step; 0 where the write key erases
    erases: bool
    exact: bool  # float32 products, for float32 inputs
    scale: float
    only_steep: bool | None = None  # for measuring: the one way for gates per channel that is compiled; None: both

    @property
    def per_key(self) -> int:
        """Value heads that share a key head."""
        return self.heads // self.key_heads

    @property
    def tiles(self) -> int:
        return self.group * self.groups

    @property
    def ahead(self) -> int:
        """How many tiles the forward prepares ahead of the state: one, but not with few tiles or without an inverse."""
        return int(self.erases and self.tiles >= (FEW_EXACT_TILES if self.exact else FEW_TILES))


def unsupported(inputs: Inputs) -> str | None:
    """Why the kernels cannot take the op's arrays, of these shapes and dtypes; None if they can."""
    q, v = inputs.q, inputs.v
    if str(q.dtype) not in ("bfloat16", "float32"):
        return f"the Pallas TPU kernels take bfloat16 and float32, not {q.dtype}"
    for name, size in (("key", q.shape[-1]), ("value", v.shape[-1])):
        if size not in SIZES:
            return f"the Pallas TPU kernels take {name} sizes of {', '.join(map(str, SIZES))}, not {size}"
    if not head_counts(q.shape[-2], v.shape[-2], q.shape[-1], v.shape[-1]):
        return (
            f"the Pallas TPU kernels find no way to cut {v.shape[-2]} heads of {q.shape[-1]} and {v.shape[-1]} into parts "
            f"of whole registers of {TILE} lanes and at most {_MOST_HEADS} heads"
        )
    return None


def vmem_bytes() -> int:
    """What a kernel may use of the VMEM of the TPU that is compiled for; of the smallest where kernels are interpreted."""
    try:
        return pltpu.get_tpu_info().vmem_capacity_bytes * 15 // 16
    except ValueError:
        return 60 * 2**20


def rows_of_batch(batch: int) -> int:
    """Sequences a grid step of a kernel that handles a token of each: those of a register, or as many as divide them all."""
    return batch if batch < 8 else next(n for n in (8, 4, 2, 1) if batch % n == 0)


def side_by_side(x: Array, rows: int) -> list[tuple[Array, int]]:
    """For each token of `[batch, tokens, channels]` an array `[batch / rows, rows, ...]`, and where it lies on its lanes.

    It is all tokens side by side, and the place counts tokens, where channels fill registers.
    """
    batch, tokens, channels = x.shape
    if channels % TILE:
        return [(x[:, n].reshape(batch // rows, rows, channels), 0) for n in range(tokens)]
    whole = x.reshape(batch // rows, rows, tokens * channels)
    return [(whole, n) for n in range(tokens)]


def repeated(inputs: Inputs, most: int) -> Inputs:
    """With at most so many value heads for every key head, so that a grid step can have all of one."""
    per_key = inputs.v.shape[-2] // inputs.k.shape[-2]
    if per_key <= most:
        return inputs
    repeats = per_key // max(n for n in range(1, most + 1) if per_key % n == 0)
    q, k = (jnp.repeat(x, repeats, axis=-2) for x in (inputs.q, inputs.k))
    erase = inputs.erase
    if erase is not None and erase.shape[-2] != inputs.v.shape[-2]:
        erase = jnp.repeat(erase, repeats, axis=-2)
    return inputs._replace(q=q, k=k, erase=erase)


def head_counts(key_heads: int, heads: int, key: int, value: int) -> list[int]:
    """The numbers of value heads a grid step that cut all arrays into whole registers, the smallest first."""
    per_key = heads // key_heads

    def whole(count: int) -> bool:
        return count == heads or (count * value % TILE == 0 and count // per_key * key % TILE == 0)

    return [n for n in range(per_key, min(heads, _MOST_HEADS) + 1, per_key) if heads % n == 0 and whole(n)]
