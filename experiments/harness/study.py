"""What an experiment declares: architectures x tasks x learning rates x weight decays x seeds, at a scale."""

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np

from delta_jax.config import check_fields, to_dict
from delta_jax.data.tasks import Task
from delta_jax.layers import mixer_options
from delta_jax.models.config import MixerSpec, ModelConfig
from delta_jax.training import OptimizerConfig

__all__ = ["Arm", "Cell", "Group", "Sweep", "arm", "file_name", "mixer"]

METRICS = ("token", "sequence", "macro", "loss", "bits")
"""What is kept of every test set: see `delta_jax.data.tasks.scores`; loss is nats and bits are bits per answer."""

LOWER_IS_BETTER = ("loss", "bits")

FLOAT32 = np.finfo(np.float32)
MAX_SEED = 2**32 - 1
ZERO_IS_A_VALUE = ("seeds", "weight_decays")
"""Of the arrays of a sweep; all other numbers in arrays are sizes, or learning rates."""


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """How large an experiment is; what the command line overrides. An experiment may add fields of its own.

    Attributes:
        arms, cells: names of those that run; None is all.
        learning_rates, weight_decays, seeds: every combination is a run.
        rates_together: all learning rates train side by side; else one after the other, which is faster where runs stop
            early and some rates are slow.
        steps: optimizer steps of a run.
        batch_size: sequences of a step.
        train_examples: size of a fixed training set, gone through in epochs; None draws new sequences at every step.
        test_examples: sequences of every test set.
        evaluate_every: steps between evaluations.
        stop_at: a run ends early when the study's metric on the first test set reaches this; None never.
        hidden_size, num_heads, head_dim, num_layers, intermediate_size: of the models, see `ModelConfig` and
            `MixerSettings`.
        initializer_std: see `ModelConfig`.
        dtype: of the computation.
        optimizer: its schedule and numbers; learning rate and weight decay are set by the run.
        checkpoint_minutes: time between checkpoints of a group of runs.
    """

    arms: tuple[str, ...] | None = None
    cells: tuple[str, ...] | None = None
    learning_rates: tuple[float, ...]
    weight_decays: tuple[float, ...] = (0.0,)
    seeds: tuple[int, ...] = (0, 1, 2)
    rates_together: bool = True
    steps: int
    batch_size: int
    train_examples: int | None = None
    test_examples: int = 512
    evaluate_every: int = 100
    stop_at: float | None = None
    hidden_size: int = 64
    num_heads: int = 4
    head_dim: int | None = None
    num_layers: int = 1
    intermediate_size: int | None = None
    initializer_std: float = 0.02
    dtype: str = "float32"
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(final_ratio=0.0, beta2=0.999, clip_norm=None)
    )
    checkpoint_minutes: float = 2.0

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("steps", "batch_size", "test_examples", "evaluate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for entry in dataclasses.fields(self):
            _check_values(entry.name, getattr(self, entry.name), may_be_empty=entry.default == ())
        if not all(float(FLOAT32.tiny) <= rate <= float(FLOAT32.max) for rate in self.learning_rates):
            raise ValueError(
                f"learning_rates must be positive numbers that float32 holds, got {list(self.learning_rates)}"
            )
        if max(self.seeds) > MAX_SEED:
            raise ValueError(f"seeds must be from 0 to {MAX_SEED}, got {list(self.seeds)}")
        for name in ("learning_rate", "weight_decay"):
            if getattr(self.optimizer, name) != getattr(OptimizerConfig(), name):
                raise ValueError(f"optimizer.{name} is set by every run: give {name}s")
        if self.train_examples is not None and self.train_examples < self.batch_size:
            raise ValueError(
                f"train_examples must be at least batch_size, {self.batch_size}, got {self.train_examples}"
            )
        if self.checkpoint_minutes < 0:
            raise ValueError(f"checkpoint_minutes must not be negative, got {self.checkpoint_minutes}")

    def but(self, **changes: Any) -> Self:
        """The same with some fields changed."""
        return dataclasses.replace(self, **changes)


def _check_values(name: str, value: Any, *, may_be_empty: bool) -> None:
    """Numbers are finite; arrays hold something, nothing twice, and sizes that are positive."""
    values = value if isinstance(value, tuple) else (value,)
    if any(isinstance(one, float) and not math.isfinite(one) for one in values):
        raise ValueError(f"{name} must be finite, got {value}")
    if not isinstance(value, tuple):
        return
    if len(set(value)) < len(value) or not (value or may_be_empty):
        raise ValueError(f"{name} must hold at least one value, and none twice, got {list(value)}")
    numbers, zero = [one for one in value if not isinstance(one, str)], name in ZERO_IS_A_VALUE
    if any(one < 0 or (one == 0 and not zero) for one in numbers):
        raise ValueError(
            f"{name} must hold {'numbers of 0 and more' if zero else 'positive numbers'}, got {list(value)}"
        )


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One architecture of a comparison.

    Attributes:
        name: in tables, files and on the command line.
        pattern: its mixers, see `ModelConfig.pattern`.
        sweep: the study's sweep, changed where the architecture is given more or other than the rest.
    """

    name: str
    pattern: tuple[MixerSpec, ...]
    sweep: Sweep


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One problem of a comparison.

    Attributes:
        name: in tables, files and on the command line.
        task: what is trained on.
        tests: the test sets by name; the first is the one that selects and stops.
        decoder: every position is answered from the features of the last one, by a decoder of two layers (MAD's
            compression) in place of the head of a causal model.
    """

    name: str
    task: Task
    tests: Mapping[str, Task]
    decoder: bool = False


@dataclass(frozen=True, kw_only=True)
class Group:
    """The runs of one architecture on one problem that differ in learning rate and seed alone: trained side by side.

    Attributes:
        study, scale: names of what it belongs to.
        metric: one of `METRICS`; it selects and stops.
        cell, arm: names.
        model: the architecture.
        task, tests, decoder: see `Cell`.
        weight_decay: of all its runs.
        sweep: everything else.
    """

    study: str
    scale: str
    metric: str
    cell: str
    arm: str
    model: ModelConfig
    task: Any
    tests: Mapping[str, Any]
    decoder: bool
    weight_decay: float
    sweep: Sweep

    @property
    def name(self) -> str:
        """Of its file of results, without the ending."""
        sweep = self.sweep
        rate = "" if sweep.rates_together else f".lr{sweep.learning_rates[0]:g}"
        decay = f".wd{self.weight_decay:g}" if len(sweep.weight_decays) > 1 else ""
        return file_name(f"{self.cell}.{self.arm}{rate}{decay}")

    def table(self) -> dict[str, Any]:
        """All that its results depend on, as JSON-able data."""
        table = to_dict(self)
        for name in ("study", "scale", "cell", "arm"):
            del table[name]
        for name in ("arms", "cells", "weight_decays", "rates_together", "checkpoint_minutes"):
            del table["sweep"][name]
        for name, task in [("task", self.task), *self.tests.items()]:
            place = table if name == "task" else table["tests"]
            place[name] = {"task": type(task).__name__, **place[name]}
        return table


def file_name(title: str) -> str:
    """A title with what file names should not hold replaced."""
    return re.sub(r"[^A-Za-z0-9.+-]+", "_", title).strip("_")


def mixer(name: str, sweep: Sweep, **options: Any) -> MixerSpec:
    """A mixer with the heads of the sweep, and options of its own.

    Raises:
        ValueError: there is no such mixer, or it has no such option.
    """
    heads = {"num_heads": sweep.num_heads, "head_dim": sweep.head_dim}
    heads = {key: value for key, value in heads.items() if key in mixer_options(name)}
    return MixerSpec(mixer=name, options=tuple((heads | options).items()))


def arm(name: str, sweep: Sweep, *pattern: MixerSpec, **changes: Any) -> Arm:
    """An architecture; `changes` are those of its sweep."""
    return Arm(name=name, pattern=pattern, sweep=sweep.but(**changes))


def make_groups(
    study: str, scale: str, metric: str, arms: tuple[Arm, ...], cells: tuple[Cell, ...], sweep: Sweep
) -> list[Group]:
    """Every architecture on every problem, in order.

    Raises:
        ValueError: the sweep names an architecture or a problem that the study has not, or a model is impossible.
    """
    chosen_arms = _chosen("arms", sweep.arms, {arm.name: arm for arm in arms})
    chosen_cells = _chosen("cells", sweep.cells, {cell.name: cell for cell in cells})
    groups = [
        Group(
            study=study,
            scale=scale,
            metric=metric,
            cell=cell.name,
            arm=arm.name,
            model=_model(arm, cell),
            task=cell.task,
            tests=cell.tests,
            decoder=cell.decoder,
            weight_decay=weight_decay,
            sweep=arm.sweep.but(learning_rates=rates),
        )
        for cell in chosen_cells
        for arm in chosen_arms
        for weight_decay in arm.sweep.weight_decays
        for rates in _side_by_side(arm.sweep)
    ]
    names: dict[str, Group] = {}
    for group in groups:
        if names.setdefault(group.name, group) is not group:
            raise ValueError(
                f"two groups of runs would both be {group.name}.json: {_numbers(names[group.name], group)}"
            )
    return groups


def _numbers(*groups: Group) -> str:
    """What tells groups apart that have one name."""
    return " and ".join(
        f"{group.cell}, {group.arm}, learning rates {list(group.sweep.learning_rates)}, weight decay {group.weight_decay}"
        for group in groups
    )


def _side_by_side(sweep: Sweep) -> list[tuple[float, ...]]:
    """The learning rates that train together."""
    return [sweep.learning_rates] if sweep.rates_together else [(rate,) for rate in sweep.learning_rates]


def _chosen[Named](what: str, names: tuple[str, ...] | None, known: Mapping[str, Named]) -> list[Named]:
    for name in names or ():
        if name not in known:
            raise ValueError(f"{what} names {name!r}, which this experiment has not, only {', '.join(known)}")
    return [one for name, one in known.items() if names is None or name in names]


def _model(arm: Arm, cell: Cell) -> ModelConfig:
    sweep = arm.sweep
    return ModelConfig(
        vocab_size=max(task.vocab_size for task in (cell.task, *cell.tests.values())),
        hidden_size=sweep.hidden_size,
        num_layers=sweep.num_layers,
        pattern=arm.pattern,
        intermediate_size=sweep.intermediate_size,
        initializer_std=sweep.initializer_std,
        dtype=sweep.dtype,
    )
