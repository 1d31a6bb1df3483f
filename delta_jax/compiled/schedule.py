"""The time that a compiled TPU program should take: the cycles of its kernels, and the compiler's estimate of the rest.

The estimate is static. Against the times that others have published for their own kernels on v6e and TPU7x it is good to
about a tenth, as `Core.factor` and `Core.spread` have it; on the other generations nobody has checked it.
"""

import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from delta_jax.compiled.core import Core
from delta_jax.compiled.jaxpr import KernelCall
from delta_jax.compiled.llo import Kernel, read_dump
from delta_jax.compiled.work import Work, work_of

_DUMPS: list[tempfile.TemporaryDirectory[str]] = []


def dump_folder(passes: str = ".*final.*") -> Path:
    """The folder, empty, into which libtpu writes the bundles of what it compiles next.

    libtpu is told when it is loaded: where it was loaded before the first call of this function, it writes nothing.

    Args:
        passes: which passes of the compiler write, as a regular expression; heard at the first call alone.
    """
    if not _DUMPS:
        _DUMPS.append(tempfile.TemporaryDirectory(prefix="delta_jax-"))
        wanted = f"--xla_jf_dump_to={_DUMPS[0].name} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_html=false"
        wanted += f" --xla_jf_dump_llo_pass_label_regex={passes}"
        os.environ["LIBTPU_INIT_ARGS"] = " ".join([os.environ.get("LIBTPU_INIT_ARGS", ""), wanted]).strip()
    folder = Path(_DUMPS[0].name)
    for path in folder.iterdir():
        path.unlink()
    return folder


class KernelRun(NamedTuple):
    """A kernel's instruction in a program: where it comes from, its bundles, and the cycles of a step of its grid."""

    call: KernelCall
    kernel: Kernel
    vmem_bytes: int
    step_cycles: int
    steps: int  # of a run, on each core
    runs: int
    memory_cycles: float  # least that all runs need for their operands and results in HBM

    @property
    def cycles(self) -> float:
        """Of all steps of all runs; where memory is the limit, its."""
        return max(float(self.step_cycles * self.steps * self.runs), self.memory_cycles)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Where the time of a program goes, in cycles of a TensorCore, or of those that are one device.

    Attributes:
        core: whose cycles.
        work: all that is no kernel.
        kernels: name of a kernel's instruction -> its schedule, waits included.
        unread: kernels whose bundles the compiler did not write, or whose grid could not be told.
    """

    core: Core
    work: Work
    kernels: Mapping[str, KernelRun]
    unread: tuple[str, ...]

    @property
    def kernel_cycles(self) -> float:
        """Of all kernels that could be read."""
        return sum((kernel.cycles for kernel in self.kernels.values()), 0.0)

    @property
    def cycles(self) -> float:
        """All of it, but for what is unread or has no estimate."""
        return self.work.cycles + self.kernel_cycles

    def seconds(self, cycles: int | float) -> float:
        """What so many cycles should take on hardware."""
        return self.core.factor * cycles / self.core.clock

    @property
    def spread(self) -> tuple[float, float]:
        """The shortest and the longest time to be expected, over the one that is estimated."""
        least, most = self.core.spread
        return least / self.core.factor, most / self.core.factor


def schedule_of(hlo: str, calls: Sequence[KernelCall], folder: Path, core: Core, begin: str | None = None) -> Schedule:
    """Reads the schedule of a program.

    Args:
        hlo: the text of the compiled program.
        calls: `kernel_calls` of the jaxpr that was compiled.
        folder: `dump_folder()`, called before the program was compiled.
        core: what it was compiled for.
        begin: as in `work_of`.
    """
    work = work_of(hlo, begin)
    programs = read_dump(folder, set(work.kernels)) if work.kernels else {}
    found: dict[Any, KernelRun] = {}
    kernels, unread = {}, []
    calls_of = {name: call_of(name, work.shapes[name], calls) for name in work.kernels}
    for name, call in calls_of.items():
        if call and name in programs:
            bundles, utilization, vmem = programs[name]
            kernel = Kernel(bundles, utilization, gridded=call.steps > 1)
            run = KernelRun(call, kernel, vmem, kernel.cycles(core), call.steps_over(core.together), 0, 0.0)
            found.setdefault((call.name, _dims(work.shapes[name])), run)
    for name, kind in work.kernels.items():
        call = calls_of[name]
        # Equal kernels are written once: one that is missing takes the bundles of another with its origin and results.
        equal = found.get((call.name, _dims(work.shapes[name]))) if call else None
        if call and equal and call == equal.call:
            # Of an operand that is larger than what the grid visits, such as states of all layers, only that moves.
            moved = min(kind.bytes, kind.runs * call.bytes)
            kernels[name] = equal._replace(runs=kind.runs, memory_cycles=core.memory_cycles(moved))
        else:
            unread.append(name)
    return Schedule(core=core, work=work, kernels=kernels, unread=tuple(unread))


def call_of(name: str, shape: str, calls: Sequence[KernelCall]) -> KernelCall | None:
    """The call that a kernel's instruction is, by its name and the shapes of its results; None where they do not tell."""
    dims = _dims(shape)
    longest = max((len(call.name) for call in calls if call.name in name), default=0)  # "transpose_jvp_NAME__.1"
    named = [call for call in calls if call.name in name and len(call.name) == longest]
    fit = named if len(named) == 1 else [call for call in named if call.results == dims]
    return fit[0] if len({call.steps for call in fit}) == 1 else None


def _dims(shape: str) -> tuple[tuple[int, ...], ...]:
    """The sizes of an array, or of every array of a tuple; layouts and dtypes are left out."""
    return tuple(tuple(int(n) for n in found.split(",") if n) for found in re.findall(r"\[([\d,]*)\]", shape))
