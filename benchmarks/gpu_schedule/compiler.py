"""NVIDIA's compiler on a machine without a GPU: compiles a function for a GPU that is described and reads what it prints."""

import contextlib
import itertools
import os
import re
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # JAX reads the environment when it is imported
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, SingleDeviceSharding

from delta_jax.compiled.jaxpr import KernelCall, kernel_calls
from delta_jax.compiled.multiprocessor import Multiprocessor, multiprocessor
from delta_jax.compiled.sass import Program
from delta_jax.parallel import GPUS, gpu_topology
from delta_jax.parallel.gpus import description

# By these Mosaic prints what ptxas says, machine code, and shared memory; no process but this one's is to inherit them.
_PRINTS = ("MOSAIC_GPU_DUMP_PTXAS", "MOSAIC_GPU_DUMP_SASS_CTRL", "MOSAIC_GPU_DUMP_RESOURCES")
_ENTRY = re.compile(r"Compiling entry function '(\w+?)_mosaic_gpu_kernel' for '(sm_\w+)'")
_SECTION = re.compile(r"^\s*\.section\s+\.text\.(\w+?)_mosaic_gpu_kernel,", re.M)


class Printed(NamedTuple):
    """What the compiler printed of one kernel: its report, and its machine code."""

    name: str
    target: str
    report: str
    code: str

    def number(self, pattern: str) -> int:
        """The number that a pattern finds in the report; 0 where it finds none."""
        found = re.search(pattern, self.report)
        return int(found.group(1)) if found else 0

    @property
    def serialised(self) -> list[str]:
        """Numbers of ptxas's warnings that products of the warpgroup wait for each other."""
        return sorted(set(re.findall(r"\((C75\d\d)\)[^\n]* serialized ", self.report)))

    @property
    def warnings(self) -> list[str]:
        """Numbers of all that ptxas says of products of warpgroups."""
        return sorted(set(re.findall(r"\((C75\d\d)\)", self.report)))


def schedule(function: Callable[..., Any], arguments: Sequence[Any], chip: str) -> dict[str, Any]:
    """Compile for one GPU, and read every kernel.

    Args:
        function: what to compile.
        arguments: shapes with dtypes.
        chip: a key of `GPUS`.

    Returns:
        "kernels": a dictionary for every call of a kernel, in the order of the program; "milliseconds": their sum;
        "bytes": theirs; "temporary_bytes"; "seconds" of compiling.

    Raises:
        ValueError: what was printed does not fit the kernels that were traced.
    """
    gpu = GPUS[chip]
    processor = multiprocessor(gpu)
    device = gpu_topology(f"{chip}:1")[0]
    sharding = SingleDeviceSharding(device)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tuple(arguments))
    start = time.time()
    with printed() as output:
        with traced_for(chip):
            traced = jax.jit(function).trace(*shapes)
            with jax.default_device(device):  # whose architecture Mosaic takes
                lowered = traced.lower()
        compiled = lowered.compile()
        sys.stdout.flush()
        text = output.read_text(errors="replace")
    seconds = time.time() - start
    calls = list(kernel_calls(traced.jaxpr))
    kernels = [
        kernel_facts(call, shared, found, processor)
        for call, shared, found in matched(calls, text, description(gpu).capability)
    ]
    return {
        "kernels": kernels,
        "milliseconds": sum(kernel["milliseconds"] for kernel in kernels),
        "bytes": sum(kernel["bytes"] for kernel in kernels),
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "seconds": round(seconds, 1),
    }


@contextlib.contextmanager
def traced_for(chip: str) -> Iterator[None]:
    """What is traced inside is for a kind of GPU."""
    told = description(GPUS[chip])
    device = AbstractDevice(device_kind=told.kind, num_cores=told.cores, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), (AxisType.Auto,), abstract_device=device)):
        yield


@contextlib.contextmanager
def printed() -> Iterator[Path]:
    """A file of what the compiler prints inside: all that is written to standard output, by its own threads too."""
    sys.stdout.flush()
    before = {name: os.environ.get(name) for name in _PRINTS}
    os.environ.update(dict.fromkeys(_PRINTS, "1"))
    with tempfile.TemporaryDirectory(prefix="delta_jax-") as folder:
        path = Path(folder) / "output.txt"
        saved = os.dup(1)
        with path.open("w") as file:
            os.dup2(file.fileno(), 1)
        try:
            yield path
        finally:
            sys.stdout.flush()
            os.dup2(saved, 1)
            os.close(saved)
            for name, value in before.items():
                os.environ.pop(name)
                os.environ.update({} if value is None else {name: value})


def matched(
    calls: Sequence[KernelCall], output: str, capability: tuple[int, int]
) -> Iterator[tuple[KernelCall, int, Printed]]:
    """Every kernel that was traced, bytes of its shared memory, and what was printed of it.

    Shared memory is printed when a kernel is lowered, in the order of the jaxpr; the rest as kernels are compiled, those
    with the same name in that order, equal ones once in a process.
    """
    shared = [int(n) for n in re.findall(r"^Resources\(smem_scratch_bytes=(\d+)", output, re.M)]
    if len(shared) != len(calls):
        raise ValueError(f"{len(calls)} kernels were traced, but {len(shared)} lowered")
    found: dict[str, list[Printed]] = defaultdict(list)
    for kernel in read_output(output):
        found[kernel.name].append(kernel)
    keys = [(capability, call.name, str(call.equation)) for call in calls]
    for name, printed_ones in found.items():
        new = dict.fromkeys(key for key in keys if key[1] == name and key not in _PRINTED)
        if len(new) != len(printed_ones):
            raise ValueError(f"of {len(new)} kernels {name} the compiler printed {len(printed_ones)}")
        _PRINTED.update(zip(new, printed_ones, strict=True))
    for call, size, key in zip(calls, shared, keys, strict=True):
        if key not in _PRINTED:
            raise ValueError(f"the compiler did not print the kernel {call.name}")
        yield call, size, _PRINTED[key]


_PRINTED: dict[tuple[tuple[int, int], str, str], Printed] = {}  # of all that this process has compiled


def read_output(output: str) -> Iterator[Printed]:
    """The kernels that the compiler printed, in that order: warnings and report of each, then its code."""
    output = output.replace("\0", "\n")
    starts = list(_SECTION.finditer(output))
    before = 0
    for start, after in itertools.zip_longest(starts, starts[1:]):
        entry = list(_ENTRY.finditer(output, before, start.start()))[-1]
        end = len(output)
        if after is not None:
            end = output.rfind("Resources(", start.end(), after.start())
            end = after.start() if end < 0 else end
        code = re.split(r"\n\s*\.section\s|\nptxas info|\ninfo ", output[start.end() : end])[0]
        report = output[before : start.start()]
        yield Printed(entry.group(1), entry.group(2), report, code)
        before = start.end() + len(code)


def kernel_facts(call: KernelCall, shared: int, found: Printed, processor: Multiprocessor) -> dict[str, Any]:
    """What the page shows of one kernel."""
    registers = found.number(r"Used (\d+) registers")
    program = Program(found.code, processor.multiply_adds)
    own, loops = call.loops
    total = program.total(loops)
    traced = own + sum(loop.total for loop in loops)
    together, limit = processor.together(registers, call.threads, shared)
    milliseconds, sets = processor.milliseconds(
        programs=call.steps, together=together, cycles=total.estimated, busy=total.busy, memory_bytes=call.bytes
    )
    return {
        "name": call.name,
        "target": found.target,
        "programs": call.steps,
        "threads": call.threads,
        "registers": registers,
        "spill_stores": found.number(r"(\d+) bytes spill stores"),
        "spill_loads": found.number(r"(\d+) bytes spill loads"),
        "shared_bytes": shared,
        "together": together,
        "limit": limit,
        "serialised": found.serialised,
        "warnings": found.warnings,
        "loops": [loop.trips for loop in loops],
        "cycles": total.estimated,
        "issue": total.issue,
        "instructions": total.instructions,
        "tensor": total.tensor,
        "shared": total.shared,
        "multiply_adds": [total.multiply_adds, traced],
        "bytes": call.bytes,
        "milliseconds": milliseconds,
        "sets": sets,
    }
