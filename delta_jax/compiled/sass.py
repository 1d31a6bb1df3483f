"""Reads the machine code (SASS) of a GPU kernel: its loops, the units in use, the waits.

Every instruction carries control codes that the compiler wrote: for which of six scoreboards it waits, which it sets,
and how many cycles the warp stalls after it. `Program.total` replays them in order, as one warp runs, with the
latencies of `compiled.multiprocessor`: a scoreboard is free when the instruction that set it is done, products of a
warpgroup run one after another on the tensor cores, and a wait for a group of them ends some cycles after its last.
It knows nothing of other programs of the multiprocessor, of memory banks, and of how long data takes from the GPU's
memory, which waits at barriers hide. The code after the last EXIT, where waits at a barrier go on, is left out.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import NamedTuple

from delta_jax.compiled.jaxpr import Loop
from delta_jax.compiled.multiprocessor import DRAIN, LATENCY, OTHER_LATENCY, WAITS

_LINE = re.compile(
    r"^\s*(\S+):(\S+):(\S+):([Y-]):(\d+)\s+/\*([0-9a-f]+)\*/\s+(@!?U?P\S+)?\s*([A-Z][A-Za-z0-9_.]*)\s*(.*?)\s*;?\s*$"
)
_LABEL = re.compile(r"^(\.L_x_\d+):")
_SIZES = re.compile(r"(\d+)x(\d+)x(\d+)")
_WARPGROUPS_PRODUCT, _WARPS_PRODUCT = "HGMMA", "HMMA"


class Instruction(NamedTuple):
    """One line.

    Attributes:
        waits: scoreboards that must be free first.
        sets: scoreboards that are free when its operands have been read, or its result is there.
        stall: cycles until the warp's next instruction.
        operation: its name, with what is appended to it.
        operands: what follows.
        label: the label that stands before it.
    """

    waits: tuple[int, ...]
    sets: tuple[int, ...]
    stall: int
    operation: str
    operands: str
    label: str | None

    @property
    def multiplies(self) -> bool:
        """Whether it is work for the tensor cores."""
        return self.operation.startswith((_WARPGROUPS_PRODUCT, _WARPS_PRODUCT))

    @property
    def multiply_adds(self) -> int:
        """Of the four warps of a warpgroup, where it multiplies."""
        if self.operation.startswith(_WARPGROUPS_PRODUCT):
            m, n, k = self._sizes
            return m * n * k
        if self.operation.startswith(_WARPS_PRODUCT):
            found = re.search(r"\.(16|8)(8)(16|8|4)\b", self.operation)
            m, n, k = map(int, found.groups()) if found else (16, 8, 16)
            return 4 * m * n * k
        return 0

    @property
    def shared_cycles(self) -> int:
        """Cycles of shared memory, at 128 bytes a cycle without conflicts, for the four warps of a warpgroup."""
        if self.operation.startswith(_WARPGROUPS_PRODUCT):
            m, n, k = self._sizes
            left = self.operands.count("gdesc") > 1 or re.match(r"R\d+, R\d+", self.operands) is None
            return (m * k * left + n * k) * 2 // 128
        name, *parts = self.operation.split(".")
        if name in ("LDSM", "STSM"):  # matrices of 8 x 8, of each of which a lane has four bytes
            return 4 * max([int(part) for part in parts if part in ("2", "4")], default=1)
        if name in ("LDS", "STS"):
            return max([int(part) // 8 for part in parts if part in ("64", "128")], default=4)
        return 0

    @property
    def _sizes(self) -> tuple[int, int, int]:
        found = _SIZES.search(self.operation)
        if found is None:
            raise ValueError(f"no sizes in the product {self.operation!r}")
        m, n, k = map(int, found.groups())
        return m, n, k


@dataclass(frozen=True, kw_only=True)
class Cycles:
    """What a part of a program takes, in cycles but for the first and the last.

    Attributes:
        instructions: issued by a warp.
        issue: stall counts alone.
        estimated: with waits, by the assumed latencies.
        tensor: of the tensor cores.
        shared: of shared memory.
        multiply_adds: of all four warps.
    """

    instructions: float = 0.0
    issue: float = 0.0
    estimated: float = 0.0
    tensor: float = 0.0
    shared: float = 0.0
    multiply_adds: float = 0.0

    def plus(self, other: "Cycles", times: int = 1) -> "Cycles":
        """This, and so many times the other."""
        return Cycles(**{f.name: getattr(self, f.name) + times * getattr(other, f.name) for f in fields(self)})

    @property
    def busy(self) -> float:
        """Of the unit that is in use longest."""
        return max(self.instructions, self.tensor, self.shared)


class Span(NamedTuple):
    """A loop of the code that multiplies, and those inside it."""

    start: int
    stop: int
    inner: tuple["Span", ...]


class Program:
    """The code of one kernel.

    Args:
        text: its listing with control codes.
        multiply_adds: that the tensor cores do in a cycle.
    """

    def __init__(self, text: str, multiply_adds: int) -> None:
        self._rate = multiply_adds
        code = list(_parse(text))
        last = max((n for n, i in enumerate(code) if i.operation == "EXIT"), default=len(code) - 1)
        self.code = code[: last + 1]

    @cached_property
    def loops(self) -> tuple[Span, ...]:
        """Outermost loops that multiply, in order."""
        return self.find_loops(lambda body: any(i.multiplies for i in body))

    def find_loops(self, wanted: Callable[[Sequence[Instruction]], bool]) -> tuple[Span, ...]:
        """Outermost of the loops whose bodies are wanted, in order."""
        at = {i.label: n for n, i in enumerate(self.code) if i.label}
        stops: dict[int, int] = {}
        for n, i in enumerate(self.code):
            target = re.search(r"\.L_x_\d+", i.operands) if i.operation in ("BRA", "BRA.U") else None
            start = at.get(target.group(0), n + 1) if target else n + 1
            if start <= n and wanted(self.code[start : n + 1]):
                stops[start] = n + 1
        return _nested(sorted(stops.items()))

    def total(self, loops: Sequence[Loop]) -> Cycles:
        """Of one run.

        Args:
            loops: those of the kernel's jaxpr that multiply, outermost, which say how often the code's loops run.

        Raises:
            ValueError: the code's loops are not those of the jaxpr, or their turns could not be told.
        """
        return self.with_turns(self.loops, dict(self._turns(self.loops, tuple(loops))))

    def with_turns(self, spans: tuple[Span, ...], turns: Mapping[Span, int]) -> Cycles:
        """Of one run in which each of these loops, and of those inside them, takes so many turns."""
        return self._of(0, len(self.code), spans, turns, steady=False)

    def _of(self, start: int, stop: int, spans: tuple[Span, ...], turns: Mapping[Span, int], *, steady: bool) -> Cycles:
        body, at = [], start
        for span in spans:
            body += self.code[at : span.start]
            at = span.stop
        body += self.code[at:stop]
        found = Cycles(
            instructions=float(len(body)),
            issue=float(sum(max(1, i.stall) for i in body)),
            estimated=self._estimate(body, steady=steady),
            tensor=sum(i.multiply_adds for i in body) / self._rate,
            shared=float(sum(i.shared_cycles for i in body)),
            multiply_adds=float(sum(i.multiply_adds for i in body)),
        )
        for span in spans:
            found = found.plus(self._of(span.start, span.stop, span.inner, turns, steady=True), turns[span])
        return found

    def _turns(self, spans: tuple[Span, ...], loops: tuple[Loop, ...]) -> Iterator[tuple[Span, int]]:
        """How often each loop of the code runs, those inside others too, by the jaxpr's."""
        for span, loop, unrolled in self._pairs(spans, loops):
            yield span, loop.trips // unrolled
            yield from self._turns(span.inner, loop.inner)

    def _pairs(self, spans: tuple[Span, ...], loops: tuple[Loop, ...]) -> Iterator[tuple[Span, Loop, int]]:
        """Every loop of the code with that of the jaxpr, of which it may take several turns at once.

        Loops of the jaxpr without one in the code have been written out.
        """
        left = list(loops)
        for span in spans:
            once = self._once(span)
            while left:
                loop = left.pop(0)
                unrolled, rest = divmod(once, loop.once)
                if rest == 0 and unrolled and loop.trips % unrolled == 0:
                    yield span, loop, unrolled
                    break
            else:
                raise ValueError(f"no loop of the jaxpr multiplies as those {span.stop - span.start} instructions do")

    def _once(self, span: Span) -> int:
        """Multiply-adds that stand in a loop, and in those inside it."""
        return sum(i.multiply_adds for i in self.code[span.start : span.stop])

    def _estimate(self, body: Sequence[Instruction], *, steady: bool) -> float:
        """Cycles of a body, in a loop in the steady state."""
        free, now, tensor = [0.0] * 6, 0.0, 0.0
        groups: list[float] = []  # ends of groups of products under way
        marks = [0.0]
        for _ in range(4 if steady else 1):
            for i in body:
                now = max([now, *(free[n] for n in i.waits)])
                if i.multiplies:
                    tensor = max(tensor, now) + max(i.multiply_adds / self._rate, float(i.shared_cycles))
                    if "gsb0" in i.operands:
                        groups.append(tensor)
                if i.operation.startswith("WARPGROUP.DEPBAR"):
                    keep = int(i.operands.rpartition("0x")[2], 16)
                    done, groups = groups[: len(groups) - keep], groups[len(groups) - keep :] if keep else []
                    now = max([now, *(end + DRAIN for end in done[-1:])])
                if i.operation.startswith(("BAR.", "MEMBAR")):
                    now += latency(i.operation)
                for slot in i.sets:
                    free[slot] = max(free[slot], now + latency(i.operation))
                now += max(1, i.stall)
            marks.append(now)
        return marks[-1] - marks[-2]


def latency(operation: str) -> float:
    """Assumed cycles until what waits for an instruction goes on."""
    return WAITS * next((cycles for name, cycles in LATENCY.items() if operation.startswith(name)), OTHER_LATENCY)


def _parse(text: str) -> Iterator[Instruction]:
    label = None
    for line in text.splitlines():
        if found := _LABEL.match(line):
            label = found.group(1)
        elif found := _LINE.match(line):
            waits, read, written, _, stall, _, _, operation, operands = found.groups()
            sets = tuple(int(slot) for slot in (read, written) if slot != "-")
            yield Instruction(_slots(waits), sets, int(stall), operation, operands, label)
            label = None


def _slots(text: str) -> tuple[int, ...]:
    """Numbers with "&" between them, or the bits of one number."""
    if text == "-":
        return ()
    if text.startswith("0x"):
        return tuple(n for n in range(6) if int(text, 16) >> n & 1)
    return tuple(int(n) for n in text.split("&"))


def _nested(spans: list[tuple[int, int]]) -> tuple[Span, ...]:
    found: list[Span] = []
    while spans:
        start, stop = spans.pop(0)
        inner = [span for span in spans if span[1] <= stop]
        spans = [span for span in spans if span[1] > stop]
        found.append(Span(start, stop, _nested(inner)))
    return tuple(found)
