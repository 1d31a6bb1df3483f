"""The real TPU compiler on a CPU host: compiles a function for a TPU that is not there and reads what it dumps."""

import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

DUMP = tempfile.TemporaryDirectory()
os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no TPU to fight for
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={DUMP.name} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_html=false",
}

import jax  # noqa: E402 - libtpu reads the environment when it is loaded
import numpy as np  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec  # noqa: E402

from benchmarks.tpu_schedule.chips import CHIPS  # noqa: E402
from benchmarks.tpu_schedule.hlo import around  # noqa: E402
from benchmarks.tpu_schedule.llo import Kernel, read_dump  # noqa: E402


def schedule(
    function: Callable[..., Any], arguments: Sequence[Any], generation: str, *, donate: tuple[int, ...] = ()
) -> dict[str, Any]:
    """Compile for one chip and read the schedule of every kernel.

    Args:
      function: what to compile.
      arguments: arrays or shapes with dtypes.
      generation: a key of `CHIPS`.
      donate: arguments that may be overwritten.

    Returns:
      "kernels": a dictionary for every pallas_call, in the order of the program; "bytes_least": arguments and results;
      "around": the instructions that are no kernel, and "around_bytes" that they access, by the compiler's count;
      "temporary_bytes" in HBM; "seconds" of compiling.
    """
    chip = CHIPS[generation]
    device: Any = topologies.get_topology_desc(platform="tpu", topology_name=chip.topology).devices[0]
    described = AbstractDevice(device_kind=device.device_kind, num_cores=1, platform="tpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), (AxisType.Auto,), abstract_device=described)):
        traced = jax.jit(function).trace(*arguments)
        exported = jax.export.export(jax.jit(function, donate_argnums=donate), platforms=["tpu"])(*arguments)
    sharding = NamedSharding(Mesh(np.array([device]), ("x",), axis_types=(AxisType.Auto,)), PartitionSpec())
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), list(arguments))
    folder = Path(DUMP.name)
    for path in folder.iterdir():
        path.unlink()
    start = time.time()
    compiled = jax.jit(exported.call, donate_argnums=donate).lower(*shapes).compile()
    seconds = time.time() - start
    calls = list(pallas_calls(traced.jaxpr.jaxpr))
    accessed = (compiled.cost_analysis() or {}).get("bytes accessed")  # not reported for every chip
    leaves = jax.tree.leaves([traced.jaxpr.in_avals, traced.jaxpr.out_avals])
    programs = read_dump(folder)
    kernels, names = [], []
    for name, (bundles, utilization, vmem) in programs.items():
        call = next((call for call in calls if call["name"] in name), None)  # "transpose_jvp_NAME__.1"
        if call is not None:
            calls.remove(call)
            names.append(name)
            kernels.append(
                kernel_facts(Kernel(bundles, utilization, gridded=call["steps"] > 1), call, vmem, generation)
            )
    if calls:
        raise ValueError(f"no bundles were dumped for {', '.join(call['name'] for call in calls)}: {list(programs)}")
    memory: Any = compiled.memory_analysis()
    return {
        "kernels": kernels,
        "bytes_least": sum(leaf.size * leaf.dtype.itemsize for leaf in leaves),
        "temporary_bytes": memory.temp_size_in_bytes,
        "around": around(programs, compiled.as_text() or "", names),
        "around_bytes": accessed and accessed - sum(kernel["estimated_bytes"] for kernel in kernels),
        "seconds": round(seconds, 2),
    }


def kernel_facts(kernel: Kernel, call: dict[str, Any], vmem: int, generation: str) -> dict[str, Any]:
    """What the page shows of one kernel."""
    slots = kernel.slots()
    return call | {
        "listed": kernel.listed,
        "bundles": kernel.bundle_count,
        "loops": [[loop.stop - loop.start, loop.trips] for loop in kernel.loops],
        "cycles": kernel.cycles(CHIPS[generation]),
        "multiplying": kernel.multiplying(CHIPS[generation]),
        "occupancy": kernel.occupancy(),
        "fills": slots["VLOAD:FILL"],
        "spills": slots["VSTORE:SPILL"],
        "vmem_bytes": vmem,
    }


def pallas_calls(jaxpr: Any, scope: str = "") -> Iterator[dict[str, Any]]:
    """Name, grid and bytes moved of every pallas_call in a jaxpr, also inside the functions it calls."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            mapping, estimate = equation.params["grid_mapping"], equation.params["cost_estimate"]
            moved = [block_bytes(block, mapping.grid) for block in mapping.block_mappings]
            yield {
                "name": equation.params["name"] or scope,
                "grid": list(mapping.grid),
                "steps": math.prod(mapping.grid),
                "bytes": sum(moved),
                "estimated_bytes": estimate.bytes_accessed if estimate else 0,
            }
            continue
        for value in equation.params.values():
            for inner in jax.tree.leaves(value, is_leaf=lambda x: hasattr(x, "jaxpr") or hasattr(x, "eqns")):
                if hasattr(inner, "jaxpr") or hasattr(inner, "eqns"):
                    yield from pallas_calls(getattr(inner, "jaxpr", inner), equation.params.get("name") or scope)


def block_bytes(block: Any, grid: tuple[int, ...]) -> int:
    """Bytes between HBM and VMEM for one operand: a block moves when its index changes from one grid step to the next.

    An operand that the kernel fetches itself counts once. Scalars that an index is looked up in are taken as zero: there is
    one sequence.
    """
    jaxpr = block.index_map_jaxpr.jaxpr
    steps = np.indices(grid).reshape(len(grid), math.prod(grid)).astype(np.int32)

    def index_of(*at: jax.Array) -> list[Any]:
        values = dict(zip(jaxpr.invars, at, strict=False))

        def value(atom: Any) -> Any:
            return atom.val if hasattr(atom, "val") else values[atom]

        for equation in jaxpr.eqns:
            if equation.primitive.name == "get":
                results = [np.int32(0)]
            else:
                results = equation.primitive.bind(*map(value, equation.invars), **equation.params)
                results = results if equation.primitive.multiple_results else [results]
            values |= zip(equation.outvars, results, strict=True)
        return [value(atom) for atom in jaxpr.outvars]

    index = [np.broadcast_to(np.asarray(i), steps.shape[1:]) for i in jax.vmap(index_of)(*steps)] if grid else []
    changes = 1 + int(sum(np.any([i[1:] != i[:-1] for i in index], axis=0))) if index else 1
    return changes * math.prod(block.block_aval.shape) * block.array_aval.dtype.itemsize
