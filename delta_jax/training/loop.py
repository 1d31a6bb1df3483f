"""Training from the first step to the curve: the loop around the step, and all that can interrupt it."""

import contextlib
import itertools
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from delta_jax.config import to_dict
from delta_jax.data import Batch, DataError, fingerprint, load_tokenizer, train_batches, validation_batches
from delta_jax.evaluation import Measurement
from delta_jax.models.loss import bits_per_byte
from delta_jax.parallel import shard_batch
from delta_jax.training.checkpoint import Checkpoints
from delta_jax.training.config import TrainConfig
from delta_jax.training.folder import CONFIG, CURVE, keep_tokenizer, make_way, open_folder
from delta_jax.training.initial import initial_parameters, keep_origin
from delta_jax.training.metrics import EVALUATION, TRAINING, MetricsWriter, read_metrics
from delta_jax.training.plots import plot_curve
from delta_jax.training.processes import all_arrive, check_joined, is_first, wait_for_all
from delta_jax.training.progress import ProgressDisplay
from delta_jax.training.resume import note_fault, resumption
from delta_jax.training.setup import Setup, set_up
from delta_jax.training.signals import StopRequest
from delta_jax.training.state import TrainState

FAULT_SECONDS = 30
"""How long a process that cannot read the data waits for the others to find that too, before it fails alone."""


class NonFiniteLossError(ArithmeticError):
    """The loss or the gradient became infinite or NaN; the message says where and what to try."""


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """How a run ended.

    Attributes:
        step: optimizer steps done, those before a resume included.
        interrupted: a signal stopped it; every step done is saved, and running the same again continues it.
        output: the run's folder.
        training: the entries of metrics.jsonl.
        evaluations: the entries of evaluation.jsonl, the one before the first step included.

    Examples:
        >>> from pathlib import Path
        >>> TrainResult(step=3, interrupted=False, output=Path("runs/mine"), training=(), evaluations=()).step
        3
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

    A resumed run continues bit for bit as the run that was never stopped. SIGTERM, Ctrl-C or SIGHUP ends it after the
    current step or in the middle of an evaluation, with a checkpoint; so does any fault of the data. The output folder
    gets config.json, checkpoints/, metrics.jsonl, evaluation.jsonl, tensorboard/, the tokenizer.json if there is one and,
    at the end, curve.png. What of these is damaged when a run resumes is set aside and repaired with a warning; only the
    checkpoints count. What the configuration changes is printed; what may not change, and a corpus or tokenizer that is
    not the one trained on (see ``changed_data``), is refused.

    Where ``jax.distributed`` has made several processes one, each calls this with the same arguments and an output
    folder that all see. The first one writes and prints; a signal to any of them stops all after the same step.

    Args:
        config: the run.
        devices: the devices of the mesh, all of them; default ``jax.devices()``.
        progress: print what is being done, and show a progress bar.
        baselines: label -> bits per byte, drawn into the curve.

    Returns:
        How the run ended.

    Raises:
        ValueError: the configuration does not fit the devices, the tokenizer, the output folder or the
            checkpoint found there.
        DataError: a document cannot be read, or whatever else came out of the data; every step done is saved.
        NonFiniteLossError: the loss or the gradient is not finite; the newest checkpoint is from before.

    Examples:
        >>> import json
        >>> mixer = MixerSpec(mixer="delta_net", options=(("num_heads", 2),))
        >>> size = {"vocab_size": 257, "hidden_size": 8, "num_layers": 1, "intermediate_size": 0, "dtype": "float32"}
        >>> model = ModelConfig(pattern=(mixer,), **size)
        >>> data = DataConfig(path=json.__path__[0] + "/*.py", shuffle_rows=8)
        >>> sizes = {"steps": 2, "batch_size": 2, "sequence_length": 16, "evaluation_batches": 1}
        >>> config = TrainConfig(model=model, data=data, **sizes, output="run")
        >>> result = train(config, devices=jax.devices()[:1], progress=False)
        >>> result.step, len(result.evaluations)  # before the first step and after the last
        (2, 2)
    """
    output = open_folder(config.output)
    check_joined()
    _check_tokenizer(config)
    setup = set_up(config, devices)
    with StopRequest() as stop, Checkpoints(output, config.checkpoint) as checkpoints:
        about: dict[str, Any] = {"fingerprint": fingerprint(config.data)}
        if checkpoints.latest == 0:  # which no run writes
            raise ValueError(
                f"output: {output} holds weights that were imported, and no run: set another output folder and "
                f"initial={output}"
            )
        start, changed = checkpoints.latest or 0, list[str]()
        if start:
            changed = resumption(start, checkpoints.about(), config, about["fingerprint"], output)
        batches = train_batches(config.data, batch_size=config.batch_size, sequence_length=config.sequence_length)
        with ProgressDisplay(start, config.steps, enabled=progress and is_first()) as display:
            display.say(_introduction(setup, about["fingerprint"]["documents"]))
            if start:
                restored = checkpoints.restore(setup.state)
                state = restored.state
                with _faults("going back to where the run stopped in the data"):
                    batches.set_state(restored.data)
                display.say("; ".join([f"continuing from checkpoint {start} in {output}", *changed]))
            else:
                display.working("compiling and making the first parameters", begins=True)
                state = _first_state(setup, display)
            if is_first():
                make_way(output / CONFIG).write_text(json.dumps(to_dict(config), indent=1) + "\n")
            about["tokenizer"] = keep_tokenizer(output, config.data.tokenizer)
            with MetricsWriter(output, start) as writer:
                run = _Run(setup, output, checkpoints, writer, display, stop, about)
                step = run.steps(state, batches)
                finished = step == config.steps and writer.last_evaluation == step
    wait_for_all("the run's files are written")
    training, evaluations = read_metrics(output / TRAINING), read_metrics(output / EVALUATION)
    if is_first():
        plot_curve(make_way(output / CURVE), training, evaluations, baselines)
    return TrainResult(
        step=step,
        interrupted=not finished,
        output=output,
        training=tuple(training),
        evaluations=tuple(evaluations),
    )


class _Run:
    """A run at work: what it is made of and the places its results go."""

    def __init__(
        self,
        setup: Setup,
        output: Path,
        checkpoints: Checkpoints,
        writer: MetricsWriter,
        display: ProgressDisplay,
        stop: StopRequest,
        about: Mapping[str, Any],
    ):
        self._setup, self._config, self._output = setup, setup.config, output
        self._checkpoints, self._writer, self._display = checkpoints, writer, display
        self._stop, self._about = stop, about
        self._doing = "preparing"
        self._stop.announce = self._announce
        self._clock: float | None = None
        self._tokens = 0.0
        self._tokens_per_second = 0.0
        self._compiled: set[str] = set()
        self._skipped: Mapping[str, int] = {}

    def steps(self, state: TrainState, batches: Any) -> int:
        """Train to the end, until a stop is requested or until the data fails; returns the steps done.

        The figures of a step are read while the device works on the next one, but always before a checkpoint
        is written: what is saved has a finite loss behind it.

        Raises:
            DataError: a fault of the data; every step done is saved.
        """
        config, step, waiting = self._config, int(state.step), None
        position, saved = batches.get_state(), step
        try:
            if step == 0 or self._is_due(step):  # an evaluation that a stop cut short is made up for
                self._evaluate(state)
            while step < config.steps and not self._stop.ask():
                self._begin("train", "compiling the training step", "training")
                with _faults("reading the data"):
                    batch = next(batches)
                position = batches.get_state()
                state, metrics = self._setup.train_step(state, self._on_mesh(batch, config.gradient_accumulation))
                step += 1
                if waiting is not None:
                    self._record(*waiting)
                waiting = (step, batch, metrics)
                self._note_skipped(batches.skipped)
                save = step == config.steps or step % config.checkpoint.every == 0
                if save or self._is_due(step):
                    self._record(*waiting)
                    waiting = None
                if self._is_due(step):
                    self._evaluate(state)
                if save:
                    self._save(state, position)
                    saved = step
        except DataError as error:
            if not all_arrive(f"the data fails after step {step}", FAULT_SECONDS):
                raise  # the others read on, and a save takes all
            if is_first():
                note_fault(self._output, step, str(error))
            self._keep(state, position, waiting, step, saved)
            self._display.say(f"stopped by a fault of the data {self._kept(step)}")
            raise
        self._keep(state, position, waiting, step, saved)
        if self._stop.requested and not (step == config.steps and self._writer.last_evaluation == step):
            self._display.say(f"stopped {self._kept(step)}; run the same again to continue")
        return step

    def _is_due(self, step: int) -> bool:
        """Whether there should be an evaluation after this step and there is none."""
        due = step == self._config.steps or step % self._config.evaluate_every == 0
        return due and self._writer.last_evaluation != step

    def _evaluate(self, state: TrainState) -> None:
        """Measure the loss on the validation split and write it down; a stop that is requested meanwhile ends it."""
        if self._stop.requested:
            return
        step = int(state.step)
        self._begin("evaluate", "compiling the evaluation step", "evaluating")
        measurement = Measurement()
        for count, batch in enumerate(self._validation(), 1):
            measurement.add(batch, self._setup.evaluation_step(state.parameters, self._on_mesh(batch, 1)))
            self._display.working(f"step {step}: evaluating, {count} batches done", begins=False)
        if self._stop.requested:
            return
        with _faults("evaluating on the validation split"):
            result = measurement.result()
        self._writer.write(EVALUATION, step, {"loss": result.loss, "bits_per_byte": result.bits_per_byte})
        self._display.say(f"step {step}: {result.bits_per_byte:.3f} bits/byte on the validation split")
        self._clock = None

    def _begin(self, function: str, first: str, doing: str) -> None:
        """Note what is being done, and say so before the call that compiles it."""
        self._doing = doing
        if function not in self._compiled:
            self._compiled.add(function)
            self._display.working(first, begins=True)

    def _announce(self, name: str, again: bool) -> None:
        """Answer a signal, from the thread that it woke, while the main one goes on."""
        latest = self._checkpoints.latest
        lost = "everything is lost" if latest is None else f"what came after checkpoint {latest} is lost"
        if again:
            self._display.say(f"{name} again: stopping without saving, {lost}")
            return
        when = {
            "preparing": "before the next step",
            "training": "after the step at work, with a checkpoint",
            "evaluating": "in the middle of this evaluation, which the next start makes again; steps done are saved",
            "saving": "when the checkpoint is on disk",
        }[self._doing]
        self._display.say(f"{name}: stopping {when}. A second signal stops without saving: {lost} then")

    def _keep(self, state: TrainState, position: Any, waiting: tuple[Any, ...] | None, step: int, saved: int) -> None:
        """Write down and save what is not yet."""
        if waiting is not None:
            self._record(*waiting)
        if saved != step:
            self._save(state, position)
        self._doing = "saving"
        self._checkpoints.wait()

    def _kept(self, step: int) -> str:
        """What is on disk."""
        if step == 0:
            return "before the first step: there is nothing to save, the next start begins anew"
        return f"after step {step}, saved in {self._output}"

    def _note_skipped(self, skipped: Mapping[str, int]) -> None:
        """Say which documents could not be read, when there are more than before."""
        if dict(skipped) != self._skipped:
            self._skipped = dict(skipped)
            counts = ", ".join(f"{count} ({kind})" for kind, count in skipped.items())
            self._display.say(f"documents skipped so far: {counts}")

    def _validation(self) -> Iterator[Batch]:
        """The batches of an evaluation, until a stop is requested."""
        config = self._config
        with _faults("reading the validation split"):
            split = validation_batches(
                config.data,
                batch_size=config.batch_size // config.gradient_accumulation,
                sequence_length=config.sequence_length,
            )
            batches = itertools.islice(split, config.evaluation_batches)
        while not self._stop.ask():
            with _faults("reading the validation split"):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def _on_mesh(self, batch: Batch, micro_batches: int) -> dict[str, jax.Array]:
        arrays = {name: batch[name] for name in batch if name != "bytes"}
        parts = {name: array.reshape(micro_batches, -1, *array.shape[1:]) for name, array in arrays.items()}
        return shard_batch(parts, self._setup.mesh)

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
            entry |= {"skipped": sum(self._skipped.values())} if self._skipped else {}
            self._writer.write(TRAINING, step, entry)
        self._display.update(step, values["loss"], bits, self._tokens_per_second)

    def _explain(self, step: int, batch: Batch, values: Mapping[str, float]) -> str:
        path = self._output / f"non_finite_step_{step}.npz"
        if is_first():
            np.savez(path, allow_pickle=False, **batch)
        latest = self._checkpoints.latest
        kept = "no checkpoint was written yet" if latest is None else f"checkpoint {latest} is from before and intact"
        return (
            f"loss {values['loss']} with gradient norm {values['gradient_norm']} at step {step} (learning "
            f"rate {values['learning_rate']:.3g}); {kept}; the batch is in {path}. Try a lower "
            "optimizer.learning_rate, a longer optimizer.warmup_steps, a smaller optimizer.clip_norm or "
            "model.dtype=float32"
        )

    def _save(self, state: TrainState, position: Any) -> None:
        self._checkpoints.save(state, position, self._config, **self._about)
        self._clock = None


def _first_state(setup: Setup, display: ProgressDisplay) -> TrainState:
    """The state before the first step, with the weights that the run begins with."""
    if setup.config.initial is None:
        return setup.initial_state()
    parameters, changed = initial_parameters(setup.config, setup.state.parameters)
    keep_origin(setup.config.initial, Path(setup.config.output))
    display.say("; ".join([f"beginning with the weights of {setup.config.initial}", *changed]))
    return setup.initial_state(parameters)


def _introduction(setup: Setup, documents: int) -> str:
    """What is trained on what."""
    config, mesh = setup.config, setup.mesh
    parameters = sum(leaf.size for leaf in jax.tree.leaves(setup.state.parameters))
    axes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items())
    return (
        f"{parameters:,} parameters on {mesh.devices.size} {mesh.devices.flat[0].device_kind} device(s), mesh {axes}\n"
        f"{config.data.path}: {documents:,} documents, of which {config.data.validation_fraction:.3g} are held out\n"
        f"{config.steps:,} steps of {config.batch_size * config.sequence_length:,} tokens: {config.batch_size} "
        f"sequences of {config.sequence_length}, in {config.gradient_accumulation} micro-batch(es)"
    )


@contextlib.contextmanager
def _faults(doing: str) -> Iterator[None]:
    """Whatever the data raises, as one sentence."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        what = text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"
        raise DataError(f"{doing} failed: {what}") from error


def _check_tokenizer(config: TrainConfig) -> None:
    tokenizer = load_tokenizer(config.data.tokenizer)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"model.vocab_size is {config.model.vocab_size}, but the tokenizer {config.data.tokenizer} has "
            f"{tokenizer.vocab_size} ids"
        )
