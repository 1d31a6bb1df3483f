"""Training from the first step to the curve: the loop around the step, and all that can interrupt it."""

import itertools
import json
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from delta_jax.config import to_dict
from delta_jax.data import Batch, load_tokenizer, train_batches, validation_batches
from delta_jax.models.loss import bits_per_byte
from delta_jax.parallel import make_mesh, shard_batch
from delta_jax.training.checkpoint import Checkpoints
from delta_jax.training.config import TrainConfig
from delta_jax.training.metrics import EVALUATION, TRAINING, MetricsWriter, read_metrics
from delta_jax.training.optimizer import learning_rate_schedule, make_optimizer
from delta_jax.training.plots import plot_curve
from delta_jax.training.progress import ProgressDisplay
from delta_jax.training.signals import StopRequest
from delta_jax.training.state import TrainState, abstract_state, initial_state
from delta_jax.training.step import check_batch, make_evaluation_step, make_train_step

CURVE = "curve.png"
CONFIG = "config.json"


class NonFiniteLossError(ArithmeticError):
    """The loss or the gradient became infinite or NaN; the message says where and what to try."""


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """How a run ended.

    Attributes:
        step: optimizer steps done, those before a resume included.
        interrupted: a signal stopped it; the state is saved, and running the same again continues it.
        output: the run's folder.
        training: the entries of metrics.jsonl.
        evaluations: the entries of evaluation.jsonl, the one before the first step included.
    """

    step: int
    interrupted: bool
    output: Path
    training: tuple[Mapping[str, Any], ...]
    evaluations: tuple[Mapping[str, Any], ...]


def train(
    config: TrainConfig,
    *,
    devices: Sequence[jax.Device] | None = None,
    progress: bool = True,
    baselines: Mapping[str, float] | None = None,
) -> TrainResult:
    """Train a language model, resuming the run that is in the output folder if there is one.

    A resumed run continues bit for bit as the run that was never stopped. SIGTERM or Ctrl-C ends it after the
    current step, with a checkpoint. The output folder gets config.json, checkpoints/, metrics.jsonl,
    evaluation.jsonl, tensorboard/ and, at the end, curve.png.

    Args:
        config: the run.
        devices: the devices of the mesh, all of them; default ``jax.devices()``.
        progress: show a progress bar.
        baselines: label -> bits per byte, drawn into the curve.

    Returns:
        How the run ended.

    Raises:
        ValueError: the configuration does not fit the devices, the tokenizer, the output folder or the
            checkpoint found there.
        NonFiniteLossError: the loss or the gradient is not finite; the newest checkpoint is from before.
    """
    output = _writable(config.output)
    _check_tokenizer(config)
    mesh = make_mesh(config.mesh, devices)
    check_batch(config, mesh)
    optimizer = make_optimizer(config.optimizer, config.steps, config.model.parameter_rules)
    template = abstract_state(config.model, optimizer, mesh)
    batches = train_batches(config.data, batch_size=config.batch_size, sequence_length=config.sequence_length)
    with Checkpoints(output, config.checkpoint) as checkpoints, StopRequest() as stop:
        if checkpoints.latest is None:
            state = initial_state(config.model, optimizer, mesh, config.seed)
        else:
            restored = checkpoints.restore(template, config)
            state = restored.state
            batches.set_state(restored.data)
        start = int(state.step)
        (output / CONFIG).write_text(json.dumps(to_dict(config), indent=1) + "\n")
        with (
            MetricsWriter(output, start) as writer,
            ProgressDisplay(start, config.steps, enabled=progress) as display,
        ):
            run = _Run(config, mesh, output, checkpoints, writer, display)
            if start:
                display.say(f"continuing from checkpoint {start} in {output}")
            else:
                run.evaluate(state)
            step = run.steps(state, batches, stop)
    training, evaluations = read_metrics(output / TRAINING), read_metrics(output / EVALUATION)
    plot_curve(output / CURVE, training, evaluations, baselines)
    return TrainResult(
        step=step,
        interrupted=step < config.steps,
        output=output,
        training=tuple(training),
        evaluations=tuple(evaluations),
    )


class _Run:
    """The compiled functions of a run and the places its results go."""

    def __init__(
        self,
        config: TrainConfig,
        mesh: Mesh,
        output: Path,
        checkpoints: Checkpoints,
        writer: MetricsWriter,
        display: ProgressDisplay,
    ):
        self._config, self._mesh, self._output = config, mesh, output
        self._checkpoints, self._writer, self._display = checkpoints, writer, display
        schedule = learning_rate_schedule(config.optimizer, config.steps)
        optimizer = make_optimizer(config.optimizer, config.steps, config.model.parameter_rules)
        self._train_step = make_train_step(config.model, optimizer, schedule, mesh)
        self._evaluation_step = make_evaluation_step(config.model, mesh)
        self._clock: float | None = None
        self._tokens = 0.0
        self._tokens_per_second = 0.0

    def steps(self, state: TrainState, batches: Iterable[Batch], stop: StopRequest) -> int:
        """Train to the end or until a stop is requested; returns the steps done.

        The figures of a step are read while the device works on the next one, but always before a checkpoint
        is written: what is saved has a finite loss behind it.
        """
        config, step, waiting = self._config, int(state.step), None
        stream, saved = iter(batches), step
        while step < config.steps and not stop.requested:
            batch = next(stream)
            state, metrics = self._train_step(state, shard_batch(self._micro_batches(batch), self._mesh))
            step += 1
            if waiting is not None:
                self._record(*waiting)
            waiting = (step, batch, metrics)
            last = step == config.steps
            evaluate = last or step % config.evaluate_every == 0
            save = last or step % config.checkpoint.every == 0
            if evaluate or save:
                self._record(*waiting)
                waiting = None
            if evaluate:
                self.evaluate(state)
            if save:
                self._save(state, stream)
                saved = step
        if waiting is not None:
            self._record(*waiting)
        if saved != step:
            self._save(state, stream)
        self._checkpoints.wait()
        if step < config.steps:
            self._display.say(f"stopped after step {step}, saved in {self._output}; run the same again to continue")
        return step

    def evaluate(self, state: TrainState) -> None:
        """Measure the loss on the validation split and write it down."""
        nats, tokens, text = 0.0, 0.0, 0
        for batch in itertools.islice(self._validation(), self._config.evaluation_batches):
            on_device = shard_batch({name: batch[name][None] for name in batch if name != "bytes"}, self._mesh)
            batch_nats, batch_tokens = self._evaluation_step(state.parameters, on_device)
            nats, tokens = nats + float(batch_nats), tokens + float(batch_tokens)
            text += int(batch["bytes"].sum())
        step, bits = int(state.step), bits_per_byte(nats, text)
        self._writer.write(EVALUATION, step, {"loss": nats / max(tokens, 1.0), "bits_per_byte": bits})
        self._display.say(f"step {step}: {bits:.3f} bits/byte on the validation split")
        self._clock = None

    def _validation(self) -> Iterable[Batch]:
        config = self._config
        batches: Iterable[Batch] = validation_batches(
            config.data,
            batch_size=config.batch_size // config.gradient_accumulation,
            sequence_length=config.sequence_length,
        )
        return batches

    def _micro_batches(self, batch: Batch) -> Batch:
        count = self._config.gradient_accumulation
        arrays = {name: batch[name] for name in batch if name != "bytes"}
        return {name: array.reshape(count, -1, *array.shape[1:]) for name, array in arrays.items()}

    def _record(self, step: int, batch: Batch, metrics: Mapping[str, jax.Array]) -> None:
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        if not (math.isfinite(values["loss"]) and math.isfinite(values["gradient_norm"])):
            raise NonFiniteLossError(self._explain(step, batch, values))
        now = time.monotonic()
        if self._clock is None:
            self._clock, self._tokens = now, 0.0
        else:
            self._tokens += values["tokens"]
            self._tokens_per_second = self._tokens / max(now - self._clock, 1e-9)
        bits = bits_per_byte(values["loss"] * values["tokens"], int(batch["bytes"].sum()))
        if step % self._config.log_every == 0 or step == self._config.steps:
            entry = {**values, "bits_per_byte": bits, "tokens_per_second": self._tokens_per_second}
            self._writer.write(TRAINING, step, entry)
        self._display.update(step, values["loss"], bits, self._tokens_per_second)

    def _explain(self, step: int, batch: Batch, values: Mapping[str, float]) -> str:
        path = self._output / f"non_finite_step_{step}.npz"
        np.savez(path, allow_pickle=False, **batch)
        latest = self._checkpoints.latest
        kept = "no checkpoint was written yet" if latest is None else f"checkpoint {latest} is from before and intact"
        return (
            f"loss {values['loss']} with gradient norm {values['gradient_norm']} at step {step} (learning "
            f"rate {values['learning_rate']:.3g}); {kept}; the batch is in {path}. Try a lower "
            "optimizer.learning_rate, a longer optimizer.warmup_steps, a smaller optimizer.clip_norm or "
            "model.dtype=float32"
        )

    def _save(self, state: TrainState, stream: Any) -> None:
        self._checkpoints.save(state, stream.get_state(), self._config)
        self._clock = None


def _writable(path: str) -> Path:
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f'output: the folder "{path}" cannot be written ({error.strerror})') from error
    return folder


def _check_tokenizer(config: TrainConfig) -> None:
    tokenizer = load_tokenizer(config.data.tokenizer)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"model.vocab_size is {config.model.vocab_size}, but the tokenizer {config.data.tokenizer} has "
            f"{tokenizer.vocab_size} ids"
        )
