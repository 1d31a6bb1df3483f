"""How the work is cut, from the shapes alone; and what is not supported."""

import dataclasses
from typing import Literal

import jax.numpy as jnp
from jax import Array

from pallas_kernels.gpu.machine import Machine
from pallas_kernels.inputs import Inputs

CHUNK = 64  # tokens a chunk: the rows of one product of a warpgroup
SIZES = {"key": (64, 128, 256), "value": (64, 128, 256, 512)}
BLOCK = 64  # channels of a key, or of a value, that a program handles at a time
JOIN = 8  # what joining two pieces of a sequence takes XLA, in chunks of a pass over it: a guess, not measured


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static choices of a call, whose tokens are padded to whole chunks."""

    machine: Machine
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
    split: int = 1  # in how many of bfloat16 the kernels have the inputs and all that they round

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
        """In how many of bfloat16 the backward has Y, dB and A, at least.

        The gradient of a gate of a head sums their products over many tokens; where keys repeat, these sums cancel.
        """
        return 2 if self.gate == "head" else self.split

    @property
    def places(self) -> int:
        """Where the forward pass stores the states and Y: with two, those of the chunk before may be under way."""
        return 2 if self.machine.places > 1 and self._kept(2) <= self.machine.shared_bytes else 1

    def _chunk(self) -> int:
        """Matrices of 64 x 64 that a chunk of the ring takes."""
        return self.split * (self.key_blocks * (2 + self.own_erase) + 2) + 2

    def _kept(self, places: int) -> int:
        """Bytes of shared memory of the forward pass, with one chunk in the ring."""
        state = self.split * self.key_blocks
        stored = self.parts + (state if self.key > 128 else 0)
        if places > 1:
            stored = places * (state + self.parts) + self.split
        return (self._chunk() + stored) * 2 * CHUNK * BLOCK + 3 * 1024

    @property
    def own_erase(self) -> bool:
        """Whether the key that erases is another array than the one that writes."""
        return self.erases and (self.erase_heads > 0 or self.gate == "channel")

    @property
    def kinds(self) -> int:
        """How many scalars a token has: beta, and with a gate per head the four of `pallas_kernels.gpu.arrays`."""
        return 4 if self.gate == "head" else 1

    @property
    def step(self) -> int:
        """Channels of the values at a time, where all are summed over."""
        return 32 if self.machine.places > 1 or self.split == 1 else 16

    @property
    def shared_bytes(self) -> int:
        """Of shared memory, what the largest kernel takes at least: matrices of 64 x 64, and three kilobytes for the rest.

        Those are the passes over the sequence, with one chunk in the ring, and the gradients.
        """
        split, keys, places = self.split, self.key_blocks, self.machine.places
        reverse = self._chunk() + max(self.parts, split * (keys if places > 1 or self.key > 128 else 1))
        values = places * 5 * split * self.step // BLOCK + 1
        levels = 2 * split + 2 if self.gate == "channel" else 0
        gradients = split * (4 + (self.erase_heads > 0)) + 2 * (self.gate == "channel") + max(values, levels)
        return max(self._kept(1), max(reverse, gradients) * 2 * CHUNK * BLOCK + 3 * 1024)


def pieces_of(machine: Machine, heads: int, chunks: int, key: int, value: int, *, exact: bool) -> int:
    """How many pieces, a power of two, make the sequential passes over so many heads of the batch shortest.

    A pass over pieces finds their ends (`pallas_kernels.gpu.pieces`), which are joined one after another, and the pass
    proper follows: 2 chunks / pieces + JOIN pieces, in place of chunks. All programs of the first pass, which also carries
    the transitions, shall run at once; without that the pieces only wait for each other. With `exact`, pieces have the same
    number of chunks.
    """
    room = machine.multiprocessors // (heads * ((key + value) // BLOCK))
    found, least = 1, float(chunks)
    for pieces in (4, 8, 16, 32, 64):
        cost = 2 * chunks / pieces + JOIN * pieces
        if pieces <= min(room, chunks) and cost < least and not (exact and chunks % pieces):
            found, least = pieces, cost
    return found


def unsupported(machine: Machine, inputs: Inputs) -> str | None:
    """Why the kernels cannot take the op's arrays, of these shapes and dtypes; None if they can."""
    q, v, erase = inputs.q, inputs.v, inputs.erase
    dtypes = {str(q.dtype), str(v.dtype)} - {"bfloat16", "float16", "float32"}
    if dtypes:
        return f"the Pallas GPU kernels take bfloat16, float16 and float32, not {min(dtypes)}"
    for name, size in (("key", q.shape[-1]), ("value", v.shape[-1])):
        if size not in SIZES[name]:
            return f"the Pallas GPU kernels take {name} sizes of {', '.join(map(str, SIZES[name]))}, not {size}"
    plan = Plan(
        machine=machine,
        batch=1,
        key_heads=q.shape[-2],
        heads=v.shape[-2],
        chunks=1,
        key=q.shape[-1],
        value=v.shape[-1],
        gate=inputs.gate,
        erase_heads=0 if erase is None else erase.shape[-2],
        erases=True,
        scale=1.0,
        pieces=1,
        split=split_of(v),
    )
    if plan.shared_bytes > machine.shared_bytes:
        return (
            f"with keys of {plan.key} in {v.dtype} the Pallas GPU kernels take {plan.shared_bytes // 1024} KiB of shared "
            f"memory, and this GPU has {machine.shared_bytes // 1024}"
        )
    return None


def split_of(v: Array) -> int:
    """In how many of bfloat16 the kernels have arrays like this."""
    return 1 if v.dtype == jnp.bfloat16 else 2
