"""What the devices of a compiled program exchange: its collectives, between whom, and the bytes that they bring."""

import functools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from delta_jax.compiled.hlo import COLLECTIVES, Instruction, computations, instructions, runs

type Groups = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """A collective of a compiled program.

    Attributes:
        kind: one of `COLLECTIVES`.
        groups: the devices that exchange with each other, by their places in the order of the program, which is that of
            the mesh; of a permute the pairs of source and target.
        size: bytes of the whole array: what an all-gather makes, what a reduce-scatter begins with, and of any other kind
            what it leaves on a device.
        runs: how often it happens in a run of the program.
    """

    kind: str
    groups: Groups
    size: int
    runs: int

    def axes(self, mesh: Mapping[str, int]) -> tuple[str, ...]:
        """The axes of a mesh, given by their sizes, along which devices of a group differ."""
        return _axes(self.groups, tuple(mesh.items()))

    def received(self, place: Sequence[int] | None = None) -> float:
        """Bytes that a device receives in a run of the program, of all devices the one that receives most.

        With n devices in a group, an all-gather, a reduce-scatter and an all-to-all bring (n - 1) / n of the whole array,
        an all-reduce, which is a reduce-scatter and an all-gather, twice that, a permute or a broadcast all of it. How much
        a ragged all-to-all brings is known only as it runs: it counts as all that its result has room for, the most.

        Args:
            place: of each device where it is, such as its host, to count only what comes from elsewhere. What several
                devices of a place all need, or have summed before, comes through once, and each takes a part of it.
                None: every device is a place.
        """
        return most_received([self], place)

    def received_by(self, place: Sequence[int] | None = None) -> Mapping[int, float]:
        """Device -> bytes, as in `received`; those that receive nothing may be left out."""
        found: dict[int, float] = {}
        for group in self.groups:
            size = self.runs * self.size * self._share(group, place)
            found |= dict.fromkeys(group[1:] if self.kind == "collective-permute" else group, size)
        return found

    def _share(self, group: tuple[int, ...], place: Sequence[int] | None) -> float:
        members = Counter(group if place is None else (place[device] for device in group))
        fewest = min(members.values())
        if len(members) == 1:
            return 0.0
        if self.kind in ("collective-permute", "ragged-all-to-all"):
            return 1.0
        if self.kind == "collective-broadcast":
            return 1.0 / fewest
        outside = 1 - fewest / len(group)
        if self.kind == "all-to-all":
            return outside
        return (2 if self.kind == "all-reduce" else 1) * outside / fewest


def most_received(found: Sequence[Exchange], place: Sequence[int] | None = None) -> float:
    """Bytes that all of these bring to the device to which they bring most; `place` as in `Exchange.received`.

    Of the permutes of a ring that begins at one device and ends at another each brings something to a part of them only.
    """
    total: dict[int, float] = defaultdict(float)
    for exchange in found:
        for device, size in exchange.received_by(place).items():
            total[device] += size
    return max(total.values(), default=0.0)


def exchanges(hlo: str) -> list[Exchange]:
    """The collectives of a compiled program, those that bring nothing left out; loops count as often as they run.

    Args:
        hlo: the text of the compiled program, of a TPU or of any other device.
    """
    entry, lines = computations(hlo)
    partitions = re.search(r"num_partitions=(\d+)", hlo)
    devices = int(partitions.group(1)) if partitions else 1
    parsed = instructions(lines)
    here = list(_collectives(entry, 1, lines, parsed, fused=False))
    # The TPU compiler overlaps a collective with other work: a fusion starts it, and every fusion that advances or ends it
    # repeats it. The channel alone does not tell which are one: all collectives of a shard_map have the same.
    started = {_identity(found.instruction) for found in here if found.starts}
    return [
        exchange
        for found in here
        if not found.fused or found.starts or _identity(found.instruction) not in started
        if (exchange := _exchange(found, devices)).received()
    ]


@dataclass(frozen=True, kw_only=True)
class _Found:
    """A collective where it is written, which computation that is, and how often it runs."""

    instruction: Instruction
    computation: str
    runs: int
    fused: bool
    starts: bool


def _collectives(
    begin: str,
    times: int,
    lines: dict[str, list[str]],
    parsed: Mapping[str, Mapping[str, Instruction]],
    *,
    fused: bool,
) -> Iterator[_Found]:
    """Those of a computation and of all that it runs, in fusions and asynchronous computations too."""
    for computation, number in runs(begin, lines).items():
        here = parsed[computation]
        starts = {
            operand
            for instruction in here.values()
            if 'custom_call_target="AsyncCollectiveStart"' in instruction.text
            for operand in instruction.operands
        }
        for name, instruction in here.items():
            if instruction.opcode.endswith(("-done", "-update")):
                continue
            if instruction.opcode.removesuffix("-start") in COLLECTIVES:
                yield _Found(
                    instruction=instruction,
                    computation=computation,
                    runs=times * number,
                    fused=fused,
                    starts=name in starts,
                )
            elif instruction.called in parsed:
                yield from _collectives(instruction.called, times * number, lines, parsed, fused=True)


def _identity(instruction: Instruction) -> tuple[str | tuple[int, ...], ...]:
    """What is the same wherever an overlapped collective is repeated; layouts are not."""
    attributes = (re.search(name, instruction.text) for name in (r"channel_id=\d+", r'op_name="[^"]*"'))
    sizes = tuple(size for size, _ in instruction.sizes())
    return instruction.opcode, sizes, *(found.group() if found else "" for found in attributes)


def _exchange(found: _Found, devices: int) -> Exchange:
    instruction = found.instruction
    kind = instruction.opcode.removesuffix("-start")
    groups = _groups(_participants(instruction.text), devices)
    sizes, operands = [size for size, _ in instruction.sizes()], len(instruction.operands)
    # What is started begins with its operands, but for an all-reduce; words for its own use may follow the results.
    if instruction.opcode.endswith("-start") and len(sizes) > operands:
        sizes = sizes[operands:]
    size = sum(sizes[: 1 if kind == "ragged-all-to-all" else operands])
    if kind == "reduce-scatter":
        size *= len(groups[0])
    elif found.computation.startswith("all-reduce-scatter"):  # the TPU compiler's: an all-reduce whose result is cut
        kind = "reduce-scatter"
    return Exchange(kind=kind, groups=groups, size=size, runs=found.runs)


_PARTICIPANTS = re.compile(
    r"(?:replica_groups|source_target_pairs)="
    r"(\{\{[\d,{}]*\}\}|\{\}|\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?|mesh\[[^\]]*\](?:, device_ids=\(.*?\))? \{[^}]*\})"
)


def _participants(text: str) -> str:
    found = _PARTICIPANTS.search(text)
    return found.group(1) if found else "{}"


@functools.lru_cache(maxsize=1024)
def _groups(text: str, devices: int) -> Groups:
    """The groups that the text of an attribute means; none said is one of all devices."""
    if text.startswith("{{"):
        return tuple(tuple(map(int, group.split(","))) for group in re.findall(r"[\d,]*\d", text))
    if text.startswith("["):
        shape, _, order = text.partition("<=")
        return _tuples(_numbering(order).reshape(_integers(shape)))
    if text.startswith("mesh"):
        return _groups_of_mesh(text)
    return (tuple(range(devices)),)


def _groups_of_mesh(text: str) -> Groups:
    """Groups as axes of a mesh, or parts of axes: 'axis':(n)m is m parts of each of the n that the axis is cut into first.

    The order of devices follows the mesh where it is not that of their numbers.
    """
    mesh, _, axes = text.rpartition(" {")
    names, sizes = zip(*re.findall(r"'([^']*)'=(\d+)", mesh), strict=True)
    shape = tuple(map(int, sizes))
    order = re.search(r"device_ids=\((.*)\)", mesh)
    ids = (_numbering(order.group(1)) if order else np.arange(math.prod(shape))).reshape(-1)
    whole = dict(zip(names, np.indices(shape).reshape(len(shape), -1), strict=True))
    others = {name: along.copy() for name, along in whole.items()}  # where a device is but for its place in its group
    for name, before, parts in re.findall(r"'([^']*)'(?::\((\d+)\)(\d+))?", axes):
        size = shape[names.index(name)]
        number = int(parts or size)
        after = size // (int(before or 1) * number)
        others[name] -= whole[name] // after % number * after
    groups: dict[tuple[int, ...], list[int]] = {}
    for device, group in zip(
        ids.tolist(), zip(*(along.tolist() for along in others.values()), strict=True), strict=True
    ):
        groups.setdefault(group, []).append(device)
    return tuple(map(tuple, groups.values()))


def _numbering(text: str) -> np.ndarray:
    """Numbers from zero on in the order of [4,2]T(1,0), or those of a list."""
    shape, _, order = text.partition("T")
    if not shape.startswith("["):
        return np.array(_integers(text))
    dims = _integers(shape)
    return np.arange(math.prod(dims)).reshape(dims).transpose(_integers(order) or None)


def _integers(text: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", text)))


def _tuples(array: np.ndarray) -> Groups:
    return tuple(map(tuple, array.tolist()))


@functools.lru_cache(maxsize=1024)
def _axes(groups: Groups, mesh: tuple[tuple[str, int], ...]) -> tuple[str, ...]:
    shape = tuple(size for _, size in mesh)
    differ = [False] * len(mesh)
    for group in groups:
        along = np.unravel_index(np.array(group), shape)
        differ = [before or bool(np.ptp(place)) for before, place in zip(differ, along, strict=True)]
    return tuple(name for (name, _), different in zip(mesh, differ, strict=True) if different)
