"""The real TPU compiler on a CPU host: compiles a function for a TPU that is not there and reads what it dumps."""

import os
import time
from collections.abc import Callable, Sequence
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # JAX reads the environment when it is imported
import numpy as np
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from benchmarks.tpu_schedule import GENERATIONS
from delta_jax.compiled.core import CORES
from delta_jax.compiled.jaxpr import kernel_calls
from delta_jax.compiled.schedule import KernelRun, Schedule, dump_folder, schedule_of
from delta_jax.parallel import tpu_topology


def compile_for(
    generation: str,
    function: Callable[..., Any],
    arguments: Sequence[Any],
    *,
    donate: tuple[int, ...] = (),
    passes: str = ".*final.*",
) -> tuple[Any, Any, Schedule, float]:
    """Compile for one chip and read the schedule.

    Args:
        generation: a key of `GENERATIONS`.
        function: what to compile.
        arguments: arrays or shapes with dtypes.
        donate: arguments that may be overwritten.
        passes: which passes of the compiler are to be dumped; VMEM is read from other passes than the final ones. What a
            process asks for first stays.

    Returns:
        What was traced, what was compiled, its schedule, and the seconds of compiling.

    Raises:
        ValueError: the compiler did not write the bundles of a kernel.
    """
    folder = dump_folder(passes)
    device: Any = tpu_topology(GENERATIONS[generation])[0]
    described = AbstractDevice(device_kind=device.device_kind, num_cores=1, platform="tpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), (AxisType.Auto,), abstract_device=described)):
        traced = jax.jit(function).trace(*arguments)
        exported = jax.export.export(jax.jit(function, donate_argnums=donate), platforms=["tpu"])(*arguments)
    sharding = NamedSharding(Mesh(np.array([device]), ("x",), axis_types=(AxisType.Auto,)), PartitionSpec())
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), list(arguments))
    start = time.time()
    compiled = jax.jit(exported.call, donate_argnums=donate).lower(*shapes).compile()
    seconds = time.time() - start
    calls = list(kernel_calls(traced.jaxpr))
    schedule = schedule_of(compiled.as_text() or "", calls, folder, CORES[generation])
    if schedule.unread:
        raise ValueError(f"the bundles of these kernels could not be read: {', '.join(schedule.unread)}")
    return traced, compiled, schedule, seconds


def schedule(
    function: Callable[..., Any], arguments: Sequence[Any], generation: str, *, donate: tuple[int, ...] = ()
) -> dict[str, Any]:
    """Compile for one chip and read the schedule of every kernel.

    Args:
        function: what to compile.
        arguments: arrays or shapes with dtypes.
        generation: a key of `GENERATIONS`.
        donate: arguments that may be overwritten.

    Returns:
        "kernels": a dictionary for every pallas_call, in the order of the program; "bytes_least": arguments and results;
        "around": what XLA runs besides, as `around` has it; "milliseconds" of the whole, an estimate with its factor, and
        its "least" and "most"; "temporary_bytes" in HBM; "seconds" of compiling.
    """
    traced, compiled, found, seconds = compile_for(generation, function, arguments, donate=donate, passes=".*")
    leaves = jax.tree.leaves([traced.jaxpr.in_avals, traced.jaxpr.out_avals])
    return {
        "kernels": [kernel_facts(run, found) for run in found.kernels.values()],
        "bytes_least": sum(leaf.size * leaf.dtype.itemsize for leaf in leaves),
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "around": around(found),
        "milliseconds": milliseconds(found),
        "seconds": round(seconds, 2),
    }


def milliseconds(found: Schedule) -> dict[str, float]:
    """Of the whole program, and of its kernels alone."""
    whole = 1e3 * found.seconds(found.cycles)
    least, most = found.spread
    kernels = 1e3 * found.seconds(found.kernel_cycles)
    return {"estimate": whole, "least": least * whole, "most": most * whole, "kernels": kernels}


def around(found: Schedule) -> dict[str, Any]:
    """The instructions that are no kernel: how many run, cycles as the compiler estimates them, bytes of HBM.

    "unestimated": opcode to runs of those for which it has no estimate.
    """
    work = found.work
    kinds = (work.products, work.others)
    return {
        "instructions": sum(kind.runs for kind in kinds),
        "cycles": work.cycles,
        "bytes": sum(kind.bytes for kind in (*kinds, work.ahead)),
        "unestimated": dict(work.unestimated),
    }


def kernel_facts(run: KernelRun, found: Schedule) -> dict[str, Any]:
    """What the page shows of one kernel."""
    kernel = run.kernel
    slots = kernel.slots()
    mapping = run.call.equation.params["grid_mapping"]
    return {
        "name": run.call.name,
        "grid": list(mapping.grid),
        "steps": run.call.steps * run.runs,
        "bytes": run.runs * run.call.bytes,
        "listed": kernel.listed,
        "bundles": kernel.bundle_count,
        "loops": [[loop.stop - loop.start, loop.trips] for loop in kernel.loops],
        "cycles": run.step_cycles,
        "multiplying": kernel.multiplying(found.core),
        "occupancy": kernel.occupancy(),
        "fills": slots["VLOAD:FILL"],
        "spills": slots["VSTORE:SPILL"],
        "vmem_bytes": run.vmem_bytes,
    }
