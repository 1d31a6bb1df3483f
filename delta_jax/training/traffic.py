"""What a compiled program moves to and from the memory of its device."""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

from delta_jax.training.cost import computations, trips

_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)$")
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)[a-z0-9]*)\[([\d,]*)\](\{[^{}]*\})?")
_BODIES = re.compile(r"(?:body|condition|branch_computations|to_apply)=(%?[\w.-]+|\{[^}]*\})")
# What moves nothing by itself.
_FREE = (
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "conditional",
    "call",
    "after-all",
    "iota",
)


class _Instruction(NamedTuple):
    root: bool
    shape: str
    opcode: str
    operands: tuple[str, ...]
    text: str

    def sizes(self) -> Iterator[tuple[int, bool]]:
        """Bytes of each array of the result, and whether it lies in the device's main memory."""
        for dtype, bits, dims, layout in _ARRAY.findall(self.shape):
            size = math.prod(int(n) for n in dims.split(",") if n) * (8 if dtype == "pred" else int(bits)) // 8
            yield size, re.search(r"S\([1-9]", layout) is None

    def bytes(self) -> int:
        """Of those in main memory."""
        return sum(size for size, here in self.sizes() if here)


def memory_bytes(hlo: str) -> float:
    """Bytes that each device reads from and writes to its main memory in a run of a compiled program.

    Every instruction reads its operands and writes its result once, but for arrays in a faster memory; of an operand that
    is only sliced, or a result that is updated in place, the part alone counts. Loops count as often as they run. Padding
    of small axes to tiles is left out.

    Args:
        hlo: the text of the compiled program.
    """
    entry, lines = computations(hlo)
    parsed = {name: _parse(text) for name, text in lines.items()}
    runs: dict[str, int] = defaultdict(int)
    _count(entry, 1, lines, runs)
    moved = (
        times * _moved(instruction, parsed[name], parsed)
        for name, times in runs.items()
        for instruction in parsed[name].values()
    )
    return float(sum(moved))


def _parse(lines: list[str]) -> dict[str, _Instruction]:
    instructions = {}
    for line in lines:
        found = _INSTRUCTION.match(line)
        if found:
            root, name, shape, opcode, rest = found.groups()
            operands = tuple(re.findall(r"%([\w.-]+)", _until_closed(rest)))
            instructions[name] = _Instruction(bool(root), shape, opcode, operands, rest)
    return instructions


def _until_closed(text: str) -> str:
    depth = 1
    for index, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return text[:index]
    return text


def _count(name: str, times: int, lines: dict[str, list[str]], runs: dict[str, int]) -> None:
    """How often every computation runs, fusions and what reductions apply left out."""
    runs[name] += times
    for line in lines[name]:
        found = _INSTRUCTION.match(line)
        if found is None or found.group(4) not in ("while", "conditional", "call"):
            continue
        often = trips(line, lines) if found.group(4) == "while" else 1
        for match in _BODIES.findall(line):
            for inner in (part.strip(" %{}") for part in match.split(",")):
                if inner in lines:
                    _count(inner, times * often, lines, runs)


def _moved(instruction: _Instruction, here: dict[str, _Instruction], parsed: dict[str, dict[str, _Instruction]]) -> int:
    """Bytes that one run of an instruction moves."""
    opcode = instruction.opcode
    operands = [here[name] for name in instruction.operands if name in here]
    if opcode in _FREE or opcode.endswith(("-done", "-update")) or (opcode == "custom-call" and not operands):
        return 0  # a custom call without operands makes room
    if opcode in ("copy-start", "slice-start"):  # source and destination are the first two arrays of the result
        ends = list(instruction.sizes())[:2]
        return min(size for size, _ in ends) * sum(slow for _, slow in ends)
    if opcode.endswith("-start"):
        return 2 * sum(operand.bytes() for operand in operands)
    if opcode in ("dynamic-slice", "slice", "gather"):
        return instruction.bytes() * (2 if operands and operands[0].bytes() else 1)
    if opcode == "dynamic-update-slice":
        return operands[1].bytes() * 2 if instruction.bytes() else 0
    called = re.search(r"calls=%?([\w.-]+)", instruction.text)
    if opcode != "fusion" or called is None or called.group(1) not in parsed:
        return instruction.bytes() + sum(operand.bytes() for operand in operands)
    inside = parsed[called.group(1)]
    read = sum(_read(index, operand, inside) for index, operand in enumerate(operands))
    return read + _written(instruction, inside)


def _read(index: int, operand: _Instruction, inside: dict[str, _Instruction]) -> int:
    """Bytes that a fusion reads of an operand."""
    whole = operand.bytes()
    if not whole:
        return 0
    names = {name for name, i in inside.items() if i.opcode == "parameter" and i.text.startswith(f"{index})")}
    part = 0
    while True:  # through bitcasts
        uses = [(name, i) for name, i in inside.items() if names & set(i.operands)]
        more = {name for name, i in uses if i.opcode == "bitcast"} - names
        if not more:
            break
        names |= more
    for _, use in uses:
        if use.opcode == "bitcast":
            continue
        if use.opcode in ("dynamic-slice", "slice", "gather") and use.operands[0] in names:
            part += sum(size for size, _ in use.sizes())
        elif not (use.opcode == "dynamic-update-slice" and use.operands[0] in names):
            return whole
    return min(part, whole)


def _written(fusion: _Instruction, inside: dict[str, _Instruction]) -> int:
    """Bytes that a fusion writes; of an array that it updates in place, the update."""
    root = next(i for i in inside.values() if i.root)
    results = [inside[name] for name in root.operands] if root.opcode == "tuple" else [root]
    total = 0
    for result, (size, here) in zip(results, fusion.sizes(), strict=False):
        while result.opcode == "bitcast" and result.operands[0] in inside:
            result = inside[result.operands[0]]
        if result.opcode == "dynamic-update-slice":
            size = min(size, sum(part for part, _ in inside[result.operands[1]].sizes()))
        total += size if here else 0
    return total
