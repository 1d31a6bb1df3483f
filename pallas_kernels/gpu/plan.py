"""How the work is cut, from the shapes alone; and what is not supported."""

import dataclasses
from typing import Literal

from jax import Array

CHUNK = 64  # tokens a chunk: the rows of one product of a warpgroup
SIZES = {"key": (64, 128, 256), "value": (64, 128, 256, 512)}
BLOCK = 64  # channels of a key, or of a value, that a program handles at a time
MULTIPROCESSORS = 132  # of an H100 SXM and an H200
JOIN = 8  # what joining two pieces of a sequence takes XLA, in chunks of a pass over it: a guess, not measured
SHARED_BYTES = 227 * 1024  # shared memory that one block of threads may use


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static choices of a call, whose tokens are padded to whole chunks."""

    batch: int
    key_heads: int
    heads: int
    chunks: int
    key: int
    value: int
    gate: Literal["none", "head", "channel"]
    erase_heads: int  # heads of an erase key of its own; 0 where the write key erases
    erases: bool
    scale: float
    pieces: int  # of the sequence, which the sequential passes go over at the same time

    @property
    def per_key(self) -> int:
        """Value heads that share a key head."""
        return self.heads // self.key_heads

    @property
    def piece(self) -> int:
        """Chunks of a piece."""
        return self.chunks // self.pieces

    @property
    def key_blocks(self) -> int:
        return self.key // BLOCK

    @property
    def parts(self) -> int:
        """In how many of bfloat16 the backward keeps Y, dB, A and P.

        The gradient of a gate of a head sums their products over many tokens; where keys repeat, these sums cancel.
        """
        return 2 if self.gate == "head" else 1

    @property
    def own_erase(self) -> bool:
        """Whether the key that erases is another array than the one that writes."""
        return self.erases and (self.erase_heads > 0 or self.gate == "channel")


def pieces_of(heads: int, chunks: int, key: int, value: int, *, exact: bool) -> int:
    """How many pieces, a power of two, make the sequential passes over so many heads of the batch shortest.

    A pass over pieces finds their ends (`pallas_kernels.gpu.pieces`), which are joined one after another, and the pass
    proper follows: 2 chunks / pieces + JOIN pieces, in place of chunks. All programs of the first pass, which also carries
    the transitions, shall run at once; without that the pieces only wait for each other. With `exact`, pieces have the same
    number of chunks.
    """
    room = MULTIPROCESSORS // (heads * ((key + value) // BLOCK))
    found, least = 1, float(chunks)
    for pieces in (4, 8, 16, 32, 64):
        cost = 2 * chunks / pieces + JOIN * pieces
        if pieces <= min(room, chunks) and cost < least and not (exact and chunks % pieces):
            found, least = pieces, cost
    return found


def unsupported(q: Array, v: Array) -> str | None:
    """Why the kernels cannot take queries and values of these shapes and dtypes; None if they can."""
    if {str(q.dtype), str(v.dtype)} != {"bfloat16"}:
        return f"the Pallas GPU kernels take bfloat16, not {v.dtype if str(q.dtype) == 'bfloat16' else q.dtype}"
    for name, size in (("key", q.shape[-1]), ("value", v.shape[-1])):
        if size not in SIZES[name]:
            return f"the Pallas GPU kernels take {name} sizes of {', '.join(map(str, SIZES[name]))}, not {size}"
    return None
