"""What a training run is made of."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from delta_jax.config import check_fields, from_fields
from delta_jax.data import DataConfig
from delta_jax.models.config import ModelConfig
from delta_jax.parallel import MeshConfig


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True, kw_only=True)
class ParameterGroup:
    """Parameters that are trained in another way than the rest.

    Layers of a kind are stacked: "blocks/0/mixer/q_proj/kernel" holds that kernel of every layer that repeats the first
    entry of the pattern, so that a group has a stack as a whole or not at all.

    Attributes:
        pattern: a regular expression, searched for in a parameter's path, such as "embed|lm_head" or "/mixer/".
        learning_rate_factor: times the learning rate of the rest.
        weight_decay: in place of the optimizer's, for those of the parameters that decay at all; None is the optimizer's.
        frozen: whether they stay as they are, bit for bit; they cost no state of the optimizer and no gradient.

    Examples:
        >>> ParameterGroup(pattern="^embed/", frozen=True).learning_rate_factor
        1.0
    """

    pattern: str
    learning_rate_factor: float = 1.0
    weight_decay: float | None = None
    frozen: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"pattern {self.pattern!r} is no regular expression: {error}") from None
        _require(
            self.learning_rate_factor > 0,
            f"learning_rate_factor should be positive, got {self.learning_rate_factor} (frozen = true trains nothing)",
        )
        _require(
            self.weight_decay is None or self.weight_decay >= 0,
            f"weight_decay should not be negative, got {self.weight_decay}",
        )
        _require(
            not self.frozen or (self.learning_rate_factor == 1 and self.weight_decay is None),
            "frozen parameters have neither a learning_rate_factor nor a weight_decay",
        )


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """An optimizer with a learning-rate schedule and clipping.

    Attributes:
        name: "adamw" (Loshchilov and Hutter 2019), "lion" (Chen et al. 2023), "sgd" with momentum, or "muon" (Jordan et al.
            2024), which orthogonalises the updates of matrices, scaled so that their root mean square is that of AdamW's
            (Liu et al. 2025), and gives the rest to AdamW.
        learning_rate: the peak of the schedule.
        schedule: "cosine" (one half-period down after the warm-up) or "wsd" (warm-up, constant, then linear
            decay).
        warmup_steps: steps of linear warm-up.
        decay_fraction: the share of all steps the decay of "wsd" takes, at the end of the run.
        initial_ratio: first learning rate over the peak.
        final_ratio: last learning rate over the peak.
        beta1: decay of the first moment of AdamW; of Lion, the share of the momentum in an update.
        beta2: decay of the second moment of AdamW; of Lion, that of the momentum.
        momentum: decay of the momentum of SGD and of Muon's matrices.
        epsilon: added to the root of the second moment.
        weight_decay: decoupled decay, times the learning rate; see ``weight_decay_mask`` for what decays.
        clip_value: the size each number of a gradient is cut off at, before clip_norm; None does not clip.
        clip_norm: the global norm gradients are scaled down to; None does not clip.
        groups: parameters with a learning rate or a weight decay of their own, or frozen; the first whose pattern
            matches has a parameter.

    Examples:
        >>> OptimizerConfig(learning_rate=1e-3, schedule="wsd", warmup_steps=100).clip_norm
        1.0
    """

    name: Literal["adamw", "muon", "lion", "sgd"] = "adamw"
    learning_rate: float = 3e-4
    schedule: Literal["cosine", "wsd"] = "cosine"
    warmup_steps: int = 0
    decay_fraction: float = 0.2
    initial_ratio: float = 0.0
    final_ratio: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    momentum: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.01
    clip_value: float | None = None
    clip_norm: float | None = 1.0
    groups: tuple[ParameterGroup, ...] = ()

    def __post_init__(self) -> None:
        check_fields(self)
        _require(self.learning_rate > 0, f"learning_rate should be positive, got {self.learning_rate}")
        _require(self.warmup_steps >= 0, f"warmup_steps should not be negative, got {self.warmup_steps}")
        for name in ("decay_fraction", "initial_ratio", "final_ratio"):
            value = getattr(self, name)
            _require(0 <= value <= 1, f"{name} should lie in [0, 1], got {value}")
        for name in ("beta1", "beta2", "momentum"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"{name} should lie in [0, 1), got {value}")
        _require(self.epsilon > 0, f"epsilon should be positive, got {self.epsilon}")
        _require(self.weight_decay >= 0, f"weight_decay should not be negative, got {self.weight_decay}")
        for name in ("clip_value", "clip_norm"):
            value = getattr(self, name)
            _require(value is None or value > 0, f"{name} should be positive, got {value}")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are written (besides at the end and on interruption) and which are kept.

    Attributes:
        every: steps between checkpoints.
        keep_last: how many of the newest are kept.
        keep_every: steps that are multiples of it are kept for good; None keeps none beyond ``keep_last``.

    Examples:
        >>> CheckpointConfig(every=500, keep_last=1).keep_every is None
        True
    """

    every: int = 1000
    keep_last: int = 2
    keep_every: int | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        _require(self.every >= 1, f"every should be at least 1 step, got {self.every}")
        _require(self.keep_last >= 1, f"keep_last should be at least 1, got {self.keep_last}")
        _require(
            self.keep_every is None or self.keep_every >= 1,
            f"keep_every should be >= 1, got {self.keep_every}",
        )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run.

    Attributes:
        model: the language model. In a file or a table, keys that are left out are those of ``initial``.
        initial: where the weights come from: the output folder of another run, whose newest checkpoint is taken, the folder
            of one of its checkpoints, or a Hugging Face folder. Optimizer and data begin anew; in a file or a table the
            tokenizer is by default that of the weights. A run that has begun does not read it again. None draws them.
        data: corpus and tokenizer.
        steps: optimizer steps of the whole run.
        batch_size: sequences per optimizer step, over all devices and micro-batches.
        sequence_length: tokens per sequence.
        gradient_accumulation: micro-batches a step is cut into to save memory.
        seed: of the initialisation, in [0, 2^32); the data has its own.
        optimizer: what turns gradients into updates, and its schedule.
        ema_decay: decay of an exponential moving average of the weights, in float32, which begins as the first weights and
            is saved with them (``restore_model(folder, ema=True)`` reads it); None keeps none.
        mesh: the devices.
        checkpoint: when to save and what to keep.
        output: the folder of checkpoints, metrics and curves; a run found there is resumed.
        changed_data: what a resume does when the corpus or the tokenizer is not the one that the checkpoint was trained on:
            "refuse" it, or "allow" it and keep the place in the data, the epoch and the number of documents read.
        log_every: steps between entries of the metrics files.
        evaluate_every: steps between evaluations on the validation split; it is evaluated at the start and
            at the end in any case.
        evaluation_batches: micro-batches used by each evaluation; None uses the whole validation
            split.

    Examples:
        >>> mixer = MixerSpec(mixer="delta_net", options=(("num_heads", 2),))
        >>> model = ModelConfig(vocab_size=257, hidden_size=8, num_layers=1, pattern=(mixer,))
        >>> TrainConfig(model=model, steps=100, batch_size=8, sequence_length=32).output
        'runs/default'
    """

    model: ModelConfig
    initial: str | None = None
    data: DataConfig = field(default_factory=DataConfig)
    steps: int
    batch_size: int
    sequence_length: int
    gradient_accumulation: int = 1
    seed: int = 0
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    ema_decay: float | None = None
    mesh: MeshConfig = field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    output: str = "runs/default"
    changed_data: Literal["refuse", "allow"] = "refuse"
    log_every: int = 10
    evaluate_every: int = 1000
    evaluation_batches: int | None = None

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> "TrainConfig":
        """Reads a table, completed by what ``initial`` names."""
        if table.get("initial") is not None:
            from delta_jax.training.initial import completed  # which reads checkpoints

            table = completed(table)
        config: TrainConfig = from_fields(cls, table)
        return config

    def __post_init__(self) -> None:
        check_fields(self)
        names = (
            "steps",
            "batch_size",
            "sequence_length",
            "gradient_accumulation",
            "log_every",
            "evaluate_every",
        )
        for name in names:
            _require(getattr(self, name) >= 1, f"{name} should be at least 1, got {getattr(self, name)}")
            _require(getattr(self, name) < 2**31, f"{name} should be below 2^31, got {getattr(self, name)}")
        _require(0 <= self.seed < 2**32, f"seed should lie in [0, 2^32), got {self.seed}")
        _require(bool(self.output), "output should name a folder")
        _require(self.initial != "", "initial should name a folder")
        _require(
            self.ema_decay is None or 0 <= self.ema_decay < 1, f"ema_decay should lie in [0, 1), got {self.ema_decay}"
        )
        _require(
            self.evaluation_batches is None or self.evaluation_batches >= 1,
            f"evaluation_batches should be at least 1, got {self.evaluation_batches}",
        )
        _require(
            self.batch_size % self.gradient_accumulation == 0,
            f"batch_size ({self.batch_size}) should be a multiple of gradient_accumulation "
            f"({self.gradient_accumulation})",
        )
        _require(
            self.optimizer.warmup_steps <= self.steps,
            f"optimizer.warmup_steps ({self.optimizer.warmup_steps}) exceeds steps ({self.steps})",
        )
