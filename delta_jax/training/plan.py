"""What a training step needs on TPUs that are not here: the whole step, compiled ahead of time for a slice."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from delta_jax.parallel import make_mesh, tpu_topology
from delta_jax.training.config import TrainConfig
from delta_jax.training.cost import collective_bytes, kernel_names, product_flops
from delta_jax.training.optimizer import learning_rate_schedule, make_optimizer
from delta_jax.training.state import abstract_state
from delta_jax.training.step import abstract_batch, check_batch, make_train_step

# Memory of a chip in GiB, from Google Cloud's documentation of each TPU version ("HBM capacity per chip").
HBM_GIB = {"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32, "tpu7x": 192}


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of a chip's memory that a step takes.

    Attributes:
        arguments: train state and batch.
        outputs: what is returned and does not take the place of the old state.
        temporaries: everything between.
        program: the machine code.
    """

    arguments: int
    outputs: int
    temporaries: int
    program: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.arguments + self.outputs + self.temporaries + self.program


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A training step on a slice.

    Attributes:
        topology: the slice's name.
        device_kind: what its devices call themselves.
        chips: chips of the slice.
        devices: devices of the slice; a v4 or TPU7x chip is two.
        mesh: size of each axis.
        parameters: numbers the model learns.
        kernels: names of the Pallas kernels in the step; none where XLA makes all of it.
        flops: floating-point operations of the products of a step, on each chip; what is computed again counts again.
        hbm: bytes of a chip's memory.
        refusal: the compiler's words if it found no way to fit the step.
        memory: bytes the step takes on each chip; None after a refusal.
        collectives: kind -> bytes that each chip receives from others in a step.
        seconds: how long compiling took.
    """

    topology: str
    device_kind: str
    chips: int
    devices: int
    mesh: Mapping[str, int]
    parameters: int
    kernels: tuple[str, ...]
    flops: float
    hbm: int
    refusal: str | None
    memory: Memory | None
    collectives: Mapping[str, float]
    seconds: float

    @property
    def fits(self) -> bool:
        """Whether the step fits into the memory of a chip."""
        return self.memory is not None and self.memory.total <= self.hbm


def plan(config: TrainConfig, topology: str) -> Plan:
    """Compiles the training step of a run for a TPU slice; needs libtpu, but no TPU.

    Args:
        config: the run.
        topology: the slice, such as "v5e:16x16", or "v5e:1x1" for one chip.

    Returns:
        What the step takes and does there.

    Raises:
        ValueError: libtpu or the slice does not exist, or the run does not divide over the slice.
    """
    devices = tpu_topology(topology)
    generation = topology.partition(":")[0]
    if generation not in HBM_GIB:
        raise ValueError(f"topology {topology!r}: the generations are {', '.join(HBM_GIB)}")
    chips = len({tuple(device.coords) for device in devices})
    mesh = make_mesh(config.mesh, devices)
    check_batch(config, mesh)
    optimizer = make_optimizer(config.optimizer, config.steps, config.model.parameter_rules)
    state = abstract_state(config.model, optimizer, mesh)
    step: Any = make_train_step(config.model, optimizer, learning_rate_schedule(config.optimizer, config.steps), mesh)
    batch = abstract_batch(config, mesh)
    start = time.monotonic()
    traced = step.trace(state, batch)
    compiled, refusal = _compile(traced.lower())
    seconds = time.monotonic() - start
    cores = len(devices) // chips
    received = {} if compiled is None else collective_bytes(compiled.as_text() or "")
    return Plan(
        topology=topology,
        device_kind=devices[0].device_kind,
        chips=chips,
        devices=len(devices),
        mesh=dict(mesh.shape),
        parameters=sum(leaf.size for leaf in jax.tree.leaves(state.parameters)),
        kernels=kernel_names(traced.jaxpr),
        flops=product_flops(traced.jaxpr) / chips,
        hbm=HBM_GIB[generation] * 2**30,
        refusal=refusal,
        memory=None if compiled is None else _memory(compiled, cores),
        collectives={kind: cores * size for kind, size in received.items()},
        seconds=seconds,
    )


def _compile(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled | None, str | None]:
    """The program, or why there is none."""
    try:
        return lowered.compile(), None
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None, str(error).splitlines()[0].removeprefix("RESOURCE_EXHAUSTED: ")


def _memory(compiled: jax.stages.Compiled, cores: int) -> Memory:
    stats: Any = compiled.memory_analysis()
    return Memory(
        arguments=cores * stats.argument_size_in_bytes,
        outputs=cores * (stats.output_size_in_bytes - stats.alias_size_in_bytes),
        temporaries=cores * stats.temp_size_in_bytes,
        program=cores * stats.generated_code_size_in_bytes,
    )
