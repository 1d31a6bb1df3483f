"""The text of a compiled program: its computations, their instructions, and how often they run."""

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import NamedTuple

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)$")
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)[a-z0-9]*)\[([\d,]*)\](\{[^{}]*\})?")
_BODIES = re.compile(r"(?:body|condition|branch_computations|to_apply)=(%?[\w.-]+|\{[^}]*\})")


class Instruction(NamedTuple):
    """One line of a computation; `text` is what follows the bracket that opens its operands."""

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

    @property
    def called(self) -> str:
        """The computation that a fusion or an asynchronous instruction consists of; "" where there is none."""
        name = "to_apply" if self.opcode == "call-start" else "calls"
        found = re.search(rf"{name}=%?([\w.-]+)", self.text)
        return found.group(1) if found else ""


def computations(hlo: str) -> tuple[str, dict[str, list[str]]]:
    """The name of the entry of a compiled program, and the lines of every computation."""
    entry, current = "", ""
    lines: dict[str, list[str]] = {}
    for line in hlo.splitlines():
        head = _COMPUTATION.match(line)
        if head:
            current = head.group(2)
            lines[current] = []
            entry = current if head.group(1) else entry
        elif line.startswith("}"):
            current = ""
        elif current:
            lines[current].append(line)
    return entry, lines


def instructions(lines: Mapping[str, list[str]]) -> dict[str, dict[str, Instruction]]:
    """The instructions of every computation, by their names."""
    return {name: _parse(text) for name, text in lines.items()}


def runs(entry: str, lines: dict[str, list[str]]) -> dict[str, int]:
    """How often every computation runs in a run of the program: loops by their trips, every branch as if it were taken.

    Fusions and what reductions apply are left out: they are part of the instruction that calls them.
    """
    count: dict[str, int] = defaultdict(int)
    _count(entry, 1, lines, count)
    return count


def within(scope: str, lines: Mapping[str, list[str]]) -> set[str]:
    """The computations that instructions whose names hold `scope` run, and those that these run in turn."""
    named = re.compile(f'op_name="[^"]*{re.escape(scope)}')
    found: set[str] = set()
    new = {inner for text in lines.values() for line in text if named.search(line) for inner in _inner(line, lines)}
    while new:
        found |= new
        new = {inner for name in new for line in lines[name] for inner in _inner(line, lines)} - found
    return found


def trips(line: str, lines: dict[str, list[str]]) -> int:
    """How often a loop runs: what XLA says, or the bound its counter, which starts at zero, is compared with.

    A loop that a flag alone decides runs in no ordinary step: it is how the op makes up for what is not finite. Any other
    whose bound cannot be read counts once.
    """
    known = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
    if known:
        return int(known.group(1))
    condition = re.search(r"condition=%?([\w.-]+)", line)
    inside = "\n".join(lines[condition.group(1)]) if condition else ""
    if condition and re.search(r" (compare|fusion|call)\(", inside) is None:
        return 0
    bounds = re.findall(r"constant\((\d+)\)", inside)
    return int(bounds[0]) if len(bounds) == 1 else 1


def _parse(lines: list[str]) -> dict[str, Instruction]:
    found = {}
    for line in lines:
        match = _INSTRUCTION.match(line)
        if match:
            root, name, shape, opcode, rest = match.groups()
            operands = tuple(re.findall(r"%([\w.-]+)", _until_closed(rest)))
            found[name] = Instruction(bool(root), shape, opcode, operands, rest)
    return found


def _until_closed(text: str) -> str:
    depth = 1
    for index, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return text[:index]
    return text


def _count(name: str, times: int, lines: dict[str, list[str]], count: dict[str, int]) -> None:
    count[name] += times
    for line in lines[name]:
        inside = _inner(line, lines)
        often = trips(line, lines) if inside and " while(" in line else 1
        for inner in inside:
            _count(inner, times * often, lines, count)


def _inner(line: str, lines: Mapping[str, list[str]]) -> list[str]:
    """The computations that a loop, a condition or a call runs."""
    found = _INSTRUCTION.match(line)
    if found is None or found.group(4) not in ("while", "conditional", "call"):
        return []
    parts = (part.strip(" %{}") for match in _BODIES.findall(line) for part in match.split(","))
    return [part for part in parts if part in lines]
