"""The work of a compiled program by kinds: bytes, and the cycles that a TPU's compiler estimates."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from delta_jax.compiled.hlo import COLLECTIVES, Instruction, computations, instructions, runs, within
from delta_jax.compiled.traffic import FREE, moved_bytes

_MOVES = ("parameter", "bitcast", "copy", "transpose", "reshape", "tuple", "get-tuple-element")
_ROOM = ("AllocateBuffer", "ConcatBitcast")  # custom calls that only say where arrays lie


@dataclass
class Kind:
    """Instructions of one kind: how many run, the compiler's estimate of their cycles, bytes to and from main memory."""

    runs: int = 0
    cycles: int = 0
    bytes: int = 0


@dataclass
class Work:
    """What a device does in a run of a program, loops as often as they run.

    Attributes:
        products: matrix products and convolutions, with what is fused into them.
        others: all that is elementwise, reductions, and copies.
        collectives: exchanges with other devices; the compiler estimates no cycles for most of them.
        ahead: copies that the compiler starts early and waits for later; it estimates no cycles for them either.
        apart: what lies in the scope that was to be told apart, whatever it is.
        copies: how many of the others only change the layout or the place of an array.
        kernels: name of a Pallas kernel's instruction -> its runs and bytes; the compiler estimates no cycles for them.
        unestimated: opcode (of a custom call its target) -> runs of all other instructions without an estimate, such as the
            calls of the SparseCore. Single numbers, with which loops count, are left out.
        shapes: name of a kernel's instruction -> the shape of its results.
    """

    products: Kind = field(default_factory=Kind)
    others: Kind = field(default_factory=Kind)
    collectives: Kind = field(default_factory=Kind)
    ahead: Kind = field(default_factory=Kind)
    apart: Kind = field(default_factory=Kind)
    copies: int = 0
    kernels: dict[str, Kind] = field(default_factory=dict)
    unestimated: Counter[str] = field(default_factory=Counter)
    shapes: dict[str, str] = field(default_factory=dict)

    @property
    def cycles(self) -> int:
        """Of all instructions that have an estimate."""
        return self.products.cycles + self.others.cycles + self.collectives.cycles


def work_of(hlo: str, begin: str | None = None, *, apart: str | None = None) -> Work:
    """Sorts the instructions of a program.

    Args:
        hlo: the text of the compiled program; of cycles only the TPU's compiler says anything.
        begin: the computation of which one run is counted, such as the body of a loop; None is the whole program.
        apart: what the names of instructions hold that are to be told apart from all others, such as "jit(run)".
    """
    entry, lines = computations(hlo)
    parsed = instructions(lines)
    work = Work()
    apart_computations = set() if apart is None else within(apart, lines)
    for computation, times in runs(begin or entry, lines).items():
        here = parsed[computation]
        for name, instruction in here.items():
            moved = moved_bytes(instruction, here, parsed) if times else 0
            if computation in apart_computations or (apart is not None and _named(instruction, apart)):
                work.apart.runs += times if moved else 0
                work.apart.bytes += times * moved
            elif times:
                _add(work, name, instruction, times, moved, parsed)
    return work


def _named(instruction: Instruction, scope: str) -> bool:
    found = re.search(r'op_name="([^"]*)"', instruction.text)
    return found is not None and scope in found.group(1)


def _add(
    work: Work,
    name: str,
    instruction: Instruction,
    times: int,
    moved: int,
    parsed: Mapping[str, dict[str, Instruction]],
) -> None:
    opcode = instruction.opcode
    target = re.search(r'custom_call_target="([^"]*)"', instruction.text)
    called = target.group(1) if target else ""
    if opcode in FREE or opcode.endswith(("-done", "-update")) or called in _ROOM:
        return
    if called == "tpu_custom_call":
        work.kernels[name] = Kind(runs=times, bytes=times * moved)
        work.shapes[name] = instruction.shape
        return
    inside = {opcode} | opcodes(instruction, parsed)
    kind = work.others
    # Also those beside which a collective is under way, and those of the libraries that CPUs and GPUs call.
    if inside & {"convolution", "dot"} or re.search("gemm|matmul", called):
        kind = work.products
    elif any(o.removesuffix("-start") in COLLECTIVES for o in inside):
        kind = work.collectives
    elif opcode in ("copy-start", "slice-start"):
        kind = work.ahead
    elif opcode == "copy" or (opcode == "fusion" and inside <= {"fusion", *_MOVES}):
        work.copies += times
    found = re.search(r'"estimated_cycles":"(\d+)"', instruction.text)
    if found is None and re.match(r"\w+\[[1,]*\]", instruction.shape):
        return
    kind.runs += times
    kind.bytes += times * moved
    if found:
        kind.cycles += times * int(found.group(1))
    elif kind in (work.products, work.others):
        thread = re.search(r'async_execution_thread="([^"]*)"', instruction.text)
        work.unestimated[called or (f"{thread.group(1)} {opcode}" if thread else opcode)] += times


def opcodes(instruction: Instruction, parsed: Mapping[str, dict[str, Instruction]]) -> set[str]:
    """Of all instructions that one consists of."""
    inner = parsed.get(instruction.called, {}).values()
    return {i.opcode for i in inner}.union(*(opcodes(i, parsed) for i in inner))
