"""Reads the dump of the TPU compiler: the bundles of a kernel, its loops, the units in use, the waits.

A TPU core issues one bundle (a very long instruction word) a cycle, in order. The compiler writes the final bundles of
every kernel as text, each once, with a ">" for every loop that it lies in, and one row of numbers a bundle that says how
many slots of each unit it uses. A loop is listed once: its bundles are counted by its trip count, which is read from the
comparison that ends it.

Bundle counts hide one thing: results of the matrix units (MXU), of the units that move lanes (XLU) and of the unit of
transcendental functions (EUP) are fetched from queues, and a `vpop` that comes too early waits. `Kernel.cycles` replays the
bundles with the latencies of `Core`: an operation starts when its unit is free, a pop waits for its operation. It knows
nothing of DMA, of memory banks and of anything else that makes a core wait.
"""

import re
from collections import Counter, deque
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from delta_jax.compiled.core import Core

_COMMENT = re.compile(r"/\*.*?\*/", re.S)
_BUNDLE = re.compile(r"^ *(?:0x[0-9a-f]+|0) +((?:[A-Z]{2} ?)*) *: ([> ]*)\{(.*)", re.M)
_OPERATION = re.compile(r"(?:%(\S+) = )?([a-z]\S*)(.*)", re.S)
_UNIT = re.compile(r"(mxu|xlu)\d")


@dataclass(frozen=True)
class Loop:
    """Bundles `start` to `stop` (exclusive) run `trips` times; None where the comparison could not be read."""

    start: int
    stop: int
    trips: int | None


@dataclass(frozen=True)
class Bundle:
    depth: int
    starts_loop: bool
    operations: tuple[tuple[str, str, str], ...]  # name of the result or "", mnemonic, operands


class Kernel:
    """The schedule of one kernel.

    Args:
      bundles: text of `*-final_bundles.txt`.
      utilization: text of `*-final_hlo-static-per-bundle-utilization.txt`.
      gridded: whether the kernel has more than one grid step, so that the outermost loop is the grid's own.
    """

    def __init__(self, bundles: str, utilization: str, *, gridded: bool) -> None:
        self.bundles = parse_bundles(bundles)
        self.capacity, self.rows = parse_utilization(utilization)
        if len(self.rows) != len(self.bundles):
            raise ValueError(f"{len(self.bundles)} bundles have {len(self.rows)} rows of utilization")
        loops = find_loops(self.bundles)
        grid = max(loops, key=lambda loop: loop.stop - loop.start) if gridded and loops else None
        self.step = range(grid.start, grid.stop) if grid else range(len(self.bundles))
        self.loops = [loop for loop in loops if loop is not grid and loop.start in self.step]

    def repeats(self) -> list[int]:
        """How often each bundle of a grid step runs; a loop whose trip count could not be read counts once."""
        count = [1] * len(self.bundles)
        for loop in self.loops:
            for i in range(loop.start, loop.stop):
                count[i] *= loop.trips or 1
        return [count[i] for i in self.step]

    @property
    def listed(self) -> int:
        """Bundles of a grid step as listed, every loop once."""
        return len(self.step)

    @property
    def bundle_count(self) -> int:
        """Bundles that a grid step issues."""
        return sum(self.repeats())

    def slots(self) -> dict[str, int]:
        """Slots of each unit that a grid step uses."""
        total: Counter[str] = Counter()
        for i, repeat in zip(self.step, self.repeats(), strict=True):
            for name, used in zip(self.capacity, self.rows[i], strict=True):
                total[name] += used * repeat
        return dict(total)

    def occupancy(self) -> dict[str, float]:
        """Slots in use over slots there are, by unit, over the bundles of a grid step.

        "MXU" is the slots of the matrix units that issue something, loading of weights included; `multiplying` says how
        long they multiply.
        """
        slots = self.slots()
        return {name: slots[name] / (most * self.bundle_count) for name, most in self.capacity.items()}

    def multiplying(self, core: Core) -> float:
        """Cycles that the MXUs spend on rows, over cycles there are (bundles x MXUs)."""
        cycles = sum(
            repeat * _rows(mnemonic, core)
            for i, repeat in zip(self.step, self.repeats(), strict=True)
            for _, mnemonic, _ in self.bundles[i].operations
        )
        return cycles / (core.mxus * self.bundle_count)

    def cycles(self, core: Core) -> int:
        """Cycles of a grid step with the waits of its pops."""
        replay = _Replay(core)
        self._run(replay, self.step.start, self.step.stop, self.loops)
        return replay.now

    def _run(self, replay: "_Replay", start: int, stop: int, loops: list[Loop]) -> None:
        at = start
        while at < stop:
            inner = next((loop for loop in loops if loop.start == at), None)
            if inner is None:
                replay.issue(self.bundles[at])
                at += 1
                continue
            deeper = [loop for loop in loops if loop is not inner and loop.start >= at and loop.stop <= inner.stop]
            for _ in range(inner.trips or 1):
                self._run(replay, at, inner.stop, deeper)
            at = inner.stop


def parse_bundles(text: str) -> list[Bundle]:
    """The bundles, in the order of their addresses."""
    text = _COMMENT.sub("", text)
    starts = [*_BUNDLE.finditer(text)]
    ends = [match.start() for match in starts[1:]] + [len(text)]
    bundles = []
    for match, end in zip(starts, ends, strict=True):
        labels, depth = match[1].split(), match[2].count(">")
        parts = text[match.start(3) : end].rstrip().removesuffix("}").split(";;")
        operations = tuple(
            (found[1] or "", found[2], found[3]) for part in parts if (found := _OPERATION.match(part.strip()))
        )
        bundles.append(Bundle(depth, "LB" in labels, operations))
    return bundles


def parse_utilization(text: str) -> tuple[dict[str, int], list[list[int]]]:
    """Slots of each unit, and for every bundle the slots it uses."""
    head, _, rows = text.partition("== UTILIZATION:")
    lines = head.strip().splitlines()
    capacity = dict(zip(lines[-2].split(", "), map(int, lines[-1].split()), strict=True))
    return capacity, [list(map(int, line.split())) for line in rows.splitlines() if line.strip()]


def find_loops(bundles: list[Bundle]) -> list[Loop]:
    """Every loop, outer before inner. Empty bundles carry no depth, and delay slots may carry an outer one."""
    starts = [i for i, bundle in enumerate(bundles) if bundle.starts_loop]
    loops = []
    for start in starts:
        depth = bundles[start].depth
        limit = next((i for i in starts if i > start and bundles[i].depth <= depth), len(bundles))
        last = max(i for i in range(start, limit) if bundles[i].depth >= depth)
        loops.append(Loop(start, last + 1, _trips(bundles, start, last + 1)))
    return loops


def _trips(bundles: list[Bundle], start: int, stop: int) -> int | None:
    """Trips of a loop that counts upwards from a constant to a constant: phi, addition and comparison in its body.

    Of two constants to begin with the higher one counts: a kernel may take a turn more in its first grid step.
    """
    before = {name: (op, operands) for b in bundles[:stop] for name, op, operands in b.operations if name}
    body = {name: (op, operands) for b in bundles[start:stop] for name, op, operands in b.operations if name}
    for counter, op, operands in bundles[start].operations:
        phi = re.fullmatch(r"\s*%(\S+), %(\S+)", operands.rstrip())
        if op != "sphi" or phi is None:
            continue
        first, following = _constant(*before.get(phi[1], ("", ""))), _origin(phi[2], body)
        added, by = body.get(following, ("", ""))
        step = re.search(r"(?:^|[ )])(\d+), %(\S+)\s*$", by)
        if first is None or added != "sadd.s32" or step is None or _origin(step[2], body) != counter:
            continue
        for op, operands in body.values():
            bound = re.search(r"%(\S+), (\d+)\s*$", operands)
            if op.startswith("scmp.ge.s32") and bound is not None and _origin(bound[1], body) == following:
                return -(-(int(bound[2]) - first) // int(step[1]))
    return None


def _constant(op: str, operands: str) -> int | None:
    """The number that a scalar begins with, the higher one of two; None where it is no constant."""
    numbers = {
        "smov": re.fullmatch(r"(?:\s*\(\S+\),)?\s*(\d+)\s*", operands),
        "scalar_select": re.fullmatch(r"\s*%\S+, (\d+), (\d+)\s*", operands),
    }.get(op)
    return None if numbers is None else max((int(x) + 2**31) % 2**32 - 2**31 for x in numbers.groups())


def _origin(name: str, body: dict[str, tuple[str, str]]) -> str:
    """What a scalar is a copy of, moved or spilled."""
    spilled = {
        found[1]: found[2]
        for op, operands in body.values()
        if op == "sst" and (found := re.fullmatch(r"\s*(\[smem:\[\S+_spill\]\]) %(\S+)\s*", operands))
    }
    for _ in body:
        op, operands = body.get(name, ("", ""))
        moved = re.fullmatch(r"\s*%(\S+)\s*", operands)
        if op == "smov" and moved is not None:
            name = moved[1]
        elif op == "sld" and operands.strip() in spilled:
            name = spilled[operands.strip()]
        else:
            break
    return name


class _Replay:
    """The units of a core, bundle after bundle."""

    def __init__(self, core: Core) -> None:
        self.core = core
        self.now = 0
        self.free: Counter[str] = Counter()  # unit -> cycle from which it takes the next operation
        self.ready: dict[str, int] = {}  # result -> cycle from which it can be popped
        self.queues: dict[str, deque[int]] = {}

    def issue(self, bundle: Bundle) -> None:
        for _, mnemonic, operands in bundle.operations:
            if mnemonic.startswith("vpop"):
                self.now = max(self.now, self._popped(mnemonic, operands))
        for name, mnemonic, operands in bundle.operations:
            self._push(name, mnemonic, operands)
        self.now += 1

    def _popped(self, mnemonic: str, operands: str) -> int:
        source = operands.strip().lstrip("%")
        if source in self.ready:  # the dump names the operation whose result is popped
            return self.ready[source]
        if buffer := re.search(r"mrb\[(\d+)\]\.(mxu\d)", mnemonic):  # results with an address
            return self.ready.get(f"{buffer[2]}[{buffer[1]}]", 0)
        queue = self.queues.get(_queue(mnemonic))
        return queue.popleft() if queue else 0

    def _push(self, name: str, mnemonic: str, operands: str) -> None:
        core = self.core
        unit = found[0] if (found := _UNIT.search(mnemonic)) else ""
        if mnemonic.startswith("vmatmul"):
            start = self._occupy(
                unit, _rows(mnemonic, core), self.free[unit + " weights"] if "vlgmr" in mnemonic else 0
            )
            pops = (2 if ".bf16" in mnemonic else 1) * core.mxu_size // 128
            ready = [start + core.matmul + core.matmul_pop * i for i in range(pops)]
            if buffer := re.search(r"mrb\[(\d+)\]", mnemonic):
                self.ready |= {f"{unit}[{int(buffer[1]) + i}]": cycle for i, cycle in enumerate(ready)}
            else:
                self.queues.setdefault(f"mrf {unit}", deque()).extend(ready)
        elif mnemonic.startswith("vmatpush"):
            self._occupy(unit + " weights", core.weights * (2 if ".xpose" in mnemonic else 1))
        elif mnemonic.startswith("vxpose"):
            start = self._occupy(unit, core.lane)
            if ".end" in mnemonic:
                pops = int(operands.rsplit(",", 1)[1].split()[0]) // (16 if ".b16" in mnemonic else 8)
                queue = self.queues.setdefault(f"trf {unit}", deque())
                queue.extend(start + core.transpose + core.lane * i for i in range(pops))
        elif unit.startswith("xlu") and not mnemonic.startswith("vpop"):
            start = self._occupy(unit, core.lane)
            self.ready[name] = start + (core.reduce if ".xlane" in mnemonic else core.permute)
        elif mnemonic.startswith(_EUP):
            self.ready[name] = self._occupy("eup", 1) + core.eup

    def _occupy(self, unit: str, cycles: int, earliest: int = 0) -> int:
        start = max(self.now, self.free[unit], earliest)
        self.free[unit] = start + cycles
        return start


_EUP = ("vexp2", "vpow2", "vrcp", "vrsqrt", "vlog2", "vtanh", "verf", "vsin", "vcos", "vsigshft")


def _queue(mnemonic: str) -> str:
    """The queue a `vpop` without an operand takes from: "mrf mxu0", "trf xlu1"."""
    *_, kind, unit = mnemonic.split(".")
    return f"{kind} {unit}"


def _rows(mnemonic: str, core: Core) -> int:
    """Cycles a `vmatmul` keeps its MXU busy: 16 rows of bfloat16, 8 of float32."""
    if not mnemonic.startswith("vmatmul"):
        return 0
    return core.rows if ".bf16" in mnemonic else core.rows // 2


def vmem_bytes(text: str) -> int:
    """VMEM that a kernel allocates: windows of its blocks, scratch and the compiler's own, spills included."""
    sizes = dict(re.findall(r"#(allocation\w+) \[shape = [^\n]*?space=vmem, size = (0x[0-9a-f]+)", text))
    return sum(int(size, 16) for size in sizes.values())


def read_dump(folder: Path, names: Collection[str]) -> dict[str, tuple[str, str, int]]:
    """Those programs of a dump that are named, by their instructions' names: final bundles, utilization, bytes of VMEM."""
    found = {}
    for path in sorted(folder.glob("*-final_hlo-static-per-bundle-utilization.txt")):
        name = re.fullmatch(r"\d+-(.*)-\d+-final_hlo-static-per-bundle-utilization.txt", path.name)
        if name is None or name[1] not in names:
            continue
        stem = path.name[: name.end(1)]
        (bundles,) = (
            p for p in folder.glob(f"{glob_escape(stem)}-*-final_bundles.txt") if "schedule-analysis" not in p.name
        )
        allocations = max(folder.glob(f"{glob_escape(stem)}-*-post-delay-converter.txt"), default=None)
        vmem = vmem_bytes(allocations.read_text()) if allocations else 0
        found[name[1]] = bundles.read_text(), path.read_text(), vmem
    return found


def glob_escape(text: str) -> str:
    """`text` for a glob pattern that matches it literally."""
    return re.sub(r"([*?[])", r"[\1]", text)
