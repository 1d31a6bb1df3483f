"""Which mesh suits a run on TPUs that are not here: plans of several, those near the best of them next."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import jax

from delta_jax.parallel import AXES, Chip, MeshConfig, chip_or_gpu_of, make_mesh, tpu_topology
from delta_jax.training.config import TrainConfig
from delta_jax.training.plan import Plan, plan
from delta_jax.training.setup import set_up

type Sizes = tuple[int, ...]
type Rank = tuple[int, float]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A mesh that was looked at.

    Attributes:
        mesh: size of each axis.
        state: bytes of a chip's memory that the train state and a batch take; infinite where they cannot be cut so.
        plan: the step, compiled; None where there is none.
        refusal: why there is none, or why it does not fit.
    """

    mesh: dict[str, int]
    state: float
    plan: Plan | None
    refusal: str

    @property
    def rank(self) -> Rank:
        """What fits comes first, by the time of a step whose collectives wait for the rest; then by bytes of the state."""
        estimate = self.plan.estimate if self.plan is not None and self.plan.fits else None
        return (1, self.state) if estimate is None else (0, estimate.most)


def suggest(
    config: TrainConfig,
    topology: str,
    *,
    meanwhile: Callable[[dict[str, int]], AbstractContextManager[None]],
    tried: Callable[[Trial], None],
) -> tuple[Trial, ...]:
    """Plans the step of a run for several meshes, from its own on, as `search` chooses them.

    Where the batch, the heads or a width do not divide, or the state alone does not fit, nothing is compiled.

    Args:
        config: the run.
        topology: the slice, such as "v5e:16x16".
        meanwhile: makes of the sizes of a mesh a context that is open while the compiler works on it.
        tried: called with each mesh that was looked at, at once: all of them can take long.

    Returns:
        What was looked at, best first.

    Raises:
        ValueError: of GPUs; and as `plan` for the run's own mesh, where no mesh can be planned.
    """
    chip = chip_or_gpu_of(topology)
    if not isinstance(chip, Chip):
        raise ValueError(
            f"topology {topology!r}: meshes are compared by estimates of time, and those are of TPUs alone"
        )
    devices, hbm = tpu_topology(topology), chip.hbm_gib * 2**30
    trials: dict[Sizes, Trial] = {}

    def rank(sizes: Sizes) -> Rank:
        mesh = dict(zip(AXES, sizes, strict=True))
        run = dataclasses.replace(config, mesh=MeshConfig(**mesh))
        state, planned, refusal = math.inf, None, ""
        try:
            state = _state_bytes(run, devices)
            if state > hbm:
                refusal = "its state alone does not fit"
            else:
                planned = plan(run, topology, meanwhile=lambda: meanwhile(mesh))
                refusal = "" if planned.fits else planned.refusal or "it does not fit"
        except ValueError as error:
            refusal = str(error)
        trials[sizes] = Trial(mesh=mesh, state=state, plan=planned, refusal=refusal)
        tried(trials[sizes])
        return trials[sizes].rank

    own = tuple(make_mesh(config.mesh, devices).shape.values())
    search(own, rank)
    if all(trial.state == math.inf for trial in trials.values()):
        raise ValueError(trials[own].refusal)
    return tuple(sorted(trials.values(), key=lambda trial: trial.rank))


def search(start: Sizes, rank: Callable[[Sizes], Rank]) -> None:
    """Looks at a mesh and its neighbours, then at those of the best yet, until the best fits and has no better neighbour.

    A neighbour has a prime factor of one axis on another, so that all meshes of as many devices can be reached.

    Args:
        start: sizes of the axes.
        rank: called once a mesh; less is better, and what fits begins with 0.
    """
    found = {start: rank(start)}
    seen: set[Sizes] = set()
    while waiting := found.keys() - seen:
        nearest = min(waiting, key=lambda sizes: (found[sizes], sizes))
        best = min(found.values())
        if best[0] == 0 and best < found[nearest]:
            return
        seen.add(nearest)
        for sizes in _neighbours(nearest):
            if sizes not in found:
                found[sizes] = rank(sizes)


def _neighbours(sizes: Sizes) -> Iterator[Sizes]:
    for giver, size in enumerate(sizes):
        for factor in (n for n in range(2, size + 1) if size % n == 0 and all(n % m for m in range(2, n))):
            for taker in range(len(sizes)):
                if taker != giver:
                    moved = list(sizes)
                    moved[giver], moved[taker] = size // factor, moved[taker] * factor
                    yield tuple(moved)


def _state_bytes(config: TrainConfig, devices: Sequence[jax.Device]) -> float:
    """Of a chip, without compiling."""
    run = set_up(config, devices)
    leaves = jax.tree.leaves((run.state, run.batch))
    each = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
    return float(each * len(devices) // len({tuple(device.coords) for device in devices}))
