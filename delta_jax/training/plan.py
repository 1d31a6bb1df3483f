"""What a training step needs on TPUs or GPUs that are not here: the whole step, compiled ahead of time for them."""

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import jax

from delta_jax.compiled.core import CORES
from delta_jax.compiled.exchanges import exchanges
from delta_jax.compiled.jaxpr import kernel_calls
from delta_jax.compiled.schedule import Schedule, dump_folder, schedule_of
from delta_jax.compiled.traffic import memory_bytes
from delta_jax.parallel import Chip, Gpu, chip_or_gpu_of, gpu_topology, links_of, tpu_topology
from delta_jax.parallel.gpus import description
from delta_jax.training.config import TrainConfig
from delta_jax.training.cost import Exchanged, exchange_seconds, exchanged, product_flops
from delta_jax.training.setup import set_up


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
class Estimate:
    """How long a step should take, by the schedules that the TPU's compiler makes; no TPU has run it.

    Attributes:
        products: seconds of the matrix products and what is fused into them, by the compiler's own estimate.
        kernels: seconds of the Pallas kernels, by the cycles of their bundles, every branch as if it were taken: those with
            a gate per channel, whose tiles choose one of two ways as they run, take less.
        others: seconds of all else: elementwise work, reductions, copies; by the compiler's own estimate.
        collectives: seconds for what a chip receives from others over all of its links at once, at their published peak;
            they take no less.
        unread: names of kernels whose bundles the compiler did not write, for libtpu had been loaded before; no time has
            been counted for them.
        unestimated: opcode -> runs of instructions without an estimate, for which no time has been counted either.
        spread: the shortest and the longest time to be expected over the one estimated, of all but the collectives.
        calibrated: whether that spread is one of published times on this generation.
        tokens: tokens of a step.
        useful: seconds at the chip's peak for three times the products of the forward pass, what is computed again left out.
    """

    products: float
    kernels: float
    others: float
    collectives: float
    unread: tuple[str, ...]
    unestimated: Mapping[str, int]
    spread: tuple[float, float]
    calibrated: bool
    tokens: int
    useful: float

    @property
    def least(self) -> float:
        """Seconds if all goes well and the collectives pass beside the rest."""
        return max(self.spread[0] * (self.products + self.kernels + self.others), self.collectives)

    @property
    def most(self) -> float:
        """Seconds if all goes slowly and the rest waits for the collectives."""
        return self.spread[1] * (self.products + self.kernels + self.others) + self.collectives


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A training step on a slice of TPUs, or on GPUs.

    Attributes:
        topology: the name of the slice, or of the GPUs.
        device_kind: what its devices call themselves.
        chips: chips of the slice, or GPUs.
        devices: devices of the slice; a TPU7x chip is two.
        mesh: size of each axis.
        parameters: numbers the model learns.
        kernels: names of the Pallas kernels in the step; none where XLA makes all of it.
        flops: floating-point operations of the products of a step, on each chip; what is computed again counts again.
        hbm: bytes of a chip's memory.
        refusal: the compiler's words if it found no way to fit the step.
        memory: bytes the step takes on each chip; None after a refusal.
        exchanges: what each chip receives from others in a step, by the axes of the mesh it comes over; what takes longest
            first.
        links: what lies between chips, or inside and between hosts -> bytes a second that a chip receives over it.
        traffic: bytes that each chip moves to and from its memory in a step.
        estimate: of the time of a step; None after a refusal, and on GPUs.
        bound: on GPUs, seconds that a step takes at least: those of its products at the peak, of reading its arguments and
            writing its results once, or of its exchanges, whichever are most. None on TPUs.
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
    exchanges: tuple[Exchanged, ...]
    links: Mapping[str, float]
    traffic: float
    estimate: Estimate | None
    bound: float | None
    seconds: float

    @property
    def fits(self) -> bool:
        """Whether the step fits into the memory of a chip."""
        return self.memory is not None and self.memory.total <= self.hbm


def plan(
    config: TrainConfig, topology: str, *, meanwhile: Callable[[], AbstractContextManager[None]] = nullcontext
) -> Plan:
    """Compiles the training step of a run for a TPU slice or for GPUs; needs their compiler, but none of them.

    Args:
        config: the run.
        topology: the slice, such as "v5e:16x16", or "v5e:1x1" for one chip; or GPUs a host and hosts, such as "h100:8x4",
            or "h100:1" for one.
        meanwhile: makes a context that is open while the compiler works, to say so.

    Returns:
        What the step takes and does there.

    Raises:
        ValueError: compiler or slice do not exist, the run does not divide over the slice, or the compiler refuses it
            for another reason than memory.
    """
    chip = chip_or_gpu_of(topology)
    folder = None
    if isinstance(chip, Chip):
        folder = dump_folder()  # before libtpu is loaded
        devices = tpu_topology(topology)
        chips = len({tuple(device.coords) for device in devices})
        hbm = chip.hbm_gib * 2**30
    else:
        devices = gpu_topology(topology)
        chips, hbm = len(devices), description(chip).memory
    run = set_up(config, devices)
    start = time.monotonic()
    with meanwhile():
        traced = run.train_step.trace(run.state, run.batch)
        # Of the default device Mosaic takes the architecture that kernels for GPUs are made for.
        with nullcontext() if isinstance(chip, Chip) else jax.default_device(devices[0]):
            lowered = traced.lower()
        compiled, refusal = _compile(lowered, {} if isinstance(chip, Chip) else _ON_GPU)
    seconds = time.monotonic() - start
    cores = len(devices) // chips
    text = "" if compiled is None else compiled.as_text() or ""
    links = links_of(topology, devices, tuple(run.mesh.devices.flat))
    found = exchanges(text) if text else []
    received = exchange_seconds(found, links)
    calls = list(kernel_calls(traced.jaxpr))
    flops = product_flops(traced.jaxpr) / chips
    memory = None if compiled is None else _memory(compiled, cores)
    estimate = bound = None
    if compiled is not None and isinstance(chip, Gpu):
        bound = max(_bound(compiled, flops, chip), received)
    if text and isinstance(chip, Chip) and folder:
        forward = run.evaluation_step.trace(run.state.parameters, run.evaluation_batch).jaxpr
        useful = 3 * config.gradient_accumulation * product_flops(forward) / chips / chip.flops
        schedule = schedule_of(text, calls, folder, CORES[topology.partition(":")[0]])
        estimate = _estimate(schedule, received, config, useful)
    return Plan(
        topology=topology,
        device_kind=devices[0].device_kind,
        chips=chips,
        devices=len(devices),
        mesh=dict(run.mesh.shape),
        parameters=sum(leaf.size for leaf in jax.tree.leaves(run.state.parameters)),
        kernels=tuple(dict.fromkeys(call.name for call in calls)),
        flops=flops,
        hbm=hbm,
        refusal=refusal,
        memory=memory,
        exchanges=exchanged(found, links, dict(run.mesh.shape), cores),
        links={link.name: cores * link.bandwidth for link in links},
        traffic=cores * memory_bytes(text) if text else 0.0,
        estimate=estimate,
        bound=bound,
        seconds=seconds,
    )


# XLA asks the GPU itself how much memory a sort by CUB wants.
_ON_GPU = {"xla_gpu_enable_cub_radix_sort": False}


def _compile(lowered: jax.stages.Lowered, options: dict[str, bool]) -> tuple[jax.stages.Compiled | None, str | None]:
    """The program, or why there is none."""
    try:
        return lowered.compile(options), None
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise ValueError(f"the compiler refuses this step: {str(error).splitlines()[0]}") from error
        return None, str(error).splitlines()[0].removeprefix("RESOURCE_EXHAUSTED: ")


def _bound(compiled: jax.stages.Compiled, flops: float, gpu: Gpu) -> float:
    stats: Any = compiled.memory_analysis()
    moved = stats.argument_size_in_bytes + stats.output_size_in_bytes
    return max(flops / gpu.flops, moved / description(gpu).bandwidth)


def _estimate(schedule: Schedule, collectives: float, config: TrainConfig, useful: float) -> Estimate:
    work = schedule.work
    return Estimate(
        products=schedule.seconds(work.products.cycles),
        kernels=schedule.seconds(schedule.kernel_cycles),
        others=schedule.seconds(work.others.cycles),
        collectives=collectives,
        unread=schedule.unread,
        unestimated=dict(work.unestimated),
        spread=schedule.spread,
        calibrated=schedule.core.measured,
        tokens=config.batch_size * config.sequence_length,
        useful=useful,
    )


def _memory(compiled: jax.stages.Compiled, cores: int) -> Memory:
    stats: Any = compiled.memory_analysis()
    return Memory(
        arguments=cores * stats.argument_size_in_bytes,
        outputs=cores * (stats.output_size_in_bytes - stats.alias_size_in_bytes),
        temporaries=cores * stats.temp_size_in_bytes,
        program=cores * stats.generated_code_size_in_bytes,
    )
