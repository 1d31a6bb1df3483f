"""Runs that differ in learning rate and seed alone, trained side by side under `jax.vmap`.

A step is scaled by its run's learning rate after AdamW has made it for a learning rate of one, which is the same thing, so
one compiled step serves all runs. Runs of one seed start alike and see the same sequences. A run that reaches its goal,
or whose loss is no longer finite, keeps its parameters from then on, exactly as if it had been stopped.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float

from delta_jax.data.tasks import IGNORED, Examples, draw
from delta_jax.data.tasks.scores import (
    cumulative_accuracy,
    macro_accuracy,
    right,
    sequence_accuracy,
    token_accuracy,
    voted,
)
from delta_jax.models import LanguageModel
from delta_jax.models.loss import token_nats
from delta_jax.training import CheckpointConfig, Checkpoints, OptimizerConfig, TrainState, make_optimizer
from delta_jax.training.signals import StopRequest
from delta_jax.training.state import merge_model, split_model
from experiments.harness.decoder import Decoder
from experiments.harness.study import LOWER_IS_BETTER, Group

__all__ = ["Interrupted", "Progress", "parameters_of", "train_group"]

Progress = Callable[[int, int, str], None]
"""Told the steps done, the steps of the whole and a line of figures."""

TEST_SEED = 0
TEST_TOKENS = 32768
"""Tokens that one evaluation batch of one run holds at most."""

CURVE_POINTS = 64

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""For what runs once: on a CPU random numbers for all parameters take 14 s to compile, and one without optimisations."""

_RUNS = TrainState(step=None, parameters=0, optimizer=0)
"""Which arrays of a state have an axis of runs: all but the step."""


class Interrupted(Exception):
    """The user asked to stop; what was done so far is saved."""


class Asked(NamedTuple):
    """A batch as the step wants it, every array with a leading axis of sequences.

    Attributes:
        inputs: as in `Examples`.
        places: [n, P] positions that answer.
        targets: [n, P] what they should say, `IGNORED` where a row asks less than P.
    """

    inputs: Any
    places: Any
    targets: Any


@dataclass
class _Record:
    """What is known of the runs so far; saved with every checkpoint. `losses` are those since the last evaluation."""

    steps: list[int]
    active: list[bool]
    history: list[list[dict[str, Any]]]
    losses: list[list[float]] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    cpu_seconds: float = 0.0


def train_group(group: Group, folder: Path, progress: Progress) -> dict[str, Any]:
    """Trains all runs of a group, or goes on where a former call in this folder stopped.

    Args:
        group: what to train.
        folder: for checkpoints, of this group alone; it may be deleted afterwards.
        progress: told how far it is.

    Returns:
        JSON-able: "parameters" (of one model), "tokens" (of one run), "seconds", "cpu_seconds", and "runs", for each
        learning_rate and seed the steps, whether it reached its goal, its history and, for every test set, metrics.

    Raises:
        Interrupted: SIGTERM or Ctrl-C; a checkpoint has been written.
    """
    sweep = group.sweep
    require_proportional(sweep.optimizer)
    runs = [(seed, rate) for seed in sweep.seeds for rate in sweep.learning_rates]
    tests = {
        name: _make_test(draw(task, sweep.test_examples, split="test", seed=TEST_SEED))
        for name, task in group.tests.items()
    }
    selecting = next(iter(tests.values()))
    model = _Model(group)
    state = model.initial_state(sweep.seeds, len(sweep.learning_rates))
    rates = jnp.asarray(sweep.learning_rates, jnp.float32)
    record = _Record(steps=[0] * len(runs), active=[True] * len(runs), history=[[] for _ in runs])

    with Checkpoints(folder, CheckpointConfig(keep_last=1)) as checkpoints, StopRequest() as stop:
        if checkpoints.latest is not None:
            restored = checkpoints.restore(_abstract(state))
            state, record = restored.state, _Record(**restored.data)
        clock, saved = _Clock(record), time.monotonic()
        start = int(state.step)
        losses: list[Any] = [np.asarray(loss, np.float32) for loss in record.losses]
        for done, batch in enumerate(_batches(group, start), start + 1):
            active = jnp.asarray(record.active).reshape(len(sweep.seeds), -1)
            state, loss = model.step(state, batch, rates, active)
            losses.append(loss.reshape(-1))
            if done % sweep.evaluate_every == 0 or done == sweep.steps:
                mean = np.mean(np.stack(jax.device_get(losses)), axis=0)
                losses = []
                _note(group, record, done, mean, model.evaluate(state.parameters, selecting))
                progress(done, sweep.steps, _line(group, record))
                if not any(record.active):
                    break
            if stop.requested or time.monotonic() - saved > 60 * sweep.checkpoint_minutes:
                clock.stop()
                record.losses = [loss.tolist() for loss in jax.device_get(losses)]
                checkpoints.save(state, dataclasses.asdict(record), group)
                saved = time.monotonic()
            if stop.requested:
                checkpoints.wait()
                raise Interrupted
        results = {name: model.evaluate(state.parameters, test, curve=True) for name, test in tests.items()}
        clock.stop()
    return {
        "parameters": model.parameters,
        "tokens": sweep.steps * sweep.batch_size * group.task.length,
        "seconds": round(record.seconds, 1),
        "cpu_seconds": round(record.cpu_seconds, 1),
        "runs": [
            {
                "learning_rate": rate,
                "seed": seed,
                "steps": record.steps[index],
                "reached": bool(record.history[index]) and reached(group, record.history[index][-1]),
                "tests": {name: scores[index] for name, scores in results.items()},
                "history": record.history[index],
            }
            for index, (seed, rate) in enumerate(runs)
        ],
    }


def require_proportional(config: OptimizerConfig) -> None:
    """Raises a ValueError if what the optimizer makes for half the learning rate is not half of what it makes for the whole:
    then one update cannot be scaled for every run of a group."""
    parameters = {"kernel": jnp.asarray([[0.3, -0.7], [0.2, 0.9]]), "scale": jnp.asarray([1.0, -0.5])}
    gradients = {"kernel": jnp.asarray([[0.1, 0.4], [-0.6, 0.2]]), "scale": jnp.asarray([-0.3, 0.8])}

    def second_update(rate: float) -> list[Array]:
        changed = dataclasses.replace(config, learning_rate=rate, weight_decay=0.1, warmup_steps=0)
        optimizer = make_optimizer(changed, 4)
        _, state = optimizer.update(gradients, optimizer.init(parameters), parameters)
        return jax.tree.leaves(optimizer.update(gradients, state, parameters)[0])

    for whole, half in zip(second_update(1.0), second_update(0.5), strict=True):
        if not np.allclose(0.5 * whole, half, rtol=1e-4, atol=1e-7):
            raise ValueError(
                "sweep.optimizer: runs that train side by side scale one update by their learning rates, which is right "
                "only for an optimizer whose update is proportional to the learning rate, and this one's is not"
            )


def parameters_of(group: Group) -> int:
    """How many numbers one model of a group learns."""
    return _Model(group).parameters


class _Clock:
    """Adds the time since it was made, or last stopped, to a record."""

    def __init__(self, record: _Record):
        self._record = record
        self._wall, self._cpu = time.monotonic(), time.process_time()

    def stop(self) -> None:
        wall, cpu = time.monotonic(), time.process_time()
        self._record.seconds += wall - self._wall
        self._record.cpu_seconds += cpu - self._cpu
        self._wall, self._cpu = wall, cpu


class _Model:
    """The compiled functions of a group; the leading axes of every state are seeds and learning rates."""

    def __init__(self, group: Group):
        self._group = group
        self._optimizer = make_optimizer(
            dataclasses.replace(group.sweep.optimizer, learning_rate=1.0, weight_decay=group.weight_decay),
            group.sweep.steps,
            group.model.parameter_rules,
        )
        self._structure, shapes = split_model(nnx.eval_shape(self._new))
        self.parameters = sum(leaf.size for leaf in jax.tree.leaves(shapes))
        self._runs = len(group.sweep.seeds) * len(group.sweep.learning_rates)
        over_rates = jax.vmap(self._one_step, in_axes=(_RUNS, None, 0, 0), out_axes=(_RUNS, 0))
        over_seeds = jax.vmap(over_rates, in_axes=(_RUNS, 0, None, 0), out_axes=(_RUNS, 0))
        self.step = jax.jit(over_seeds, donate_argnums=0)
        self._answers, self._probabilities = (
            jax.jit(jax.vmap(jax.vmap(function, in_axes=(0, None)), in_axes=(0, None)))
            for function in (self._answer, self._probability)
        )

    def _new(self, seed: Any = 0) -> Any:
        rngs = nnx.Rngs(seed)  # a number or a key
        model = LanguageModel(self._group.model, rngs=rngs)
        return Decoder(model, rngs=rngs) if self._group.decoder else model

    def initial_state(self, seeds: tuple[int, ...], rates: int) -> TrainState:
        """Fresh parameters for every seed, the same for all its learning rates."""

        def make(seed: Array) -> Any:
            _, parameters = split_model(self._new(seed))
            return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (rates, *leaf.shape)), parameters)

        @functools.partial(jax.jit, compiler_options=QUICK)
        def whole(seeds: Array) -> TrainState:
            parameters = jax.vmap(make)(jax.vmap(jax.random.key)(seeds))
            init = jax.vmap(jax.vmap(self._optimizer.init))
            return TrainState(step=jnp.zeros((), jnp.int32), parameters=parameters, optimizer=init(parameters))

        return whole(jnp.asarray(seeds, jnp.uint32))

    def _logits(self, parameters: Any, batch: Asked) -> Float[Array, "batch places vocab"]:
        model = merge_model(self._structure, parameters)
        features, _ = model.features(batch.inputs)
        if batch.places.shape[1] < features.shape[1]:
            features = jnp.take_along_axis(features, batch.places[..., None], axis=1)
        return model.head(features)

    def _loss(self, parameters: Any, batch: Asked) -> Float[Array, ""]:
        asked = batch.targets != IGNORED
        nats = token_nats(self._logits(parameters, batch), batch.targets)
        return jnp.sum(nats) / jnp.maximum(jnp.sum(asked), 1).astype(jnp.float32)

    def _one_step(self, state: TrainState, batch: Asked, rate: Array, active: Array) -> tuple[TrainState, Array]:
        loss, gradients = jax.value_and_grad(self._loss)(state.parameters, batch)
        updates, optimizer = self._optimizer.update(gradients, state.optimizer, state.parameters)
        moved = optax.apply_updates(state.parameters, jax.tree.map(lambda update: rate * update, updates))
        parameters = jax.tree.map(lambda new, old: jnp.where(active, new, old), moved, state.parameters)
        return TrainState(step=state.step + 1, parameters=parameters, optimizer=optimizer), loss

    def _answer(self, parameters: Any, batch: Asked) -> tuple[Array, Array]:
        logits = self._logits(parameters, batch)
        return jnp.argmax(logits, axis=-1), token_nats(logits, batch.targets)

    def _probability(self, parameters: Any, batch: Asked) -> tuple[Array, Array]:
        logits = self._logits(parameters, batch)
        return jax.nn.softmax(logits, axis=-1), token_nats(logits, batch.targets)

    def evaluate(self, parameters: Any, test: "_Test", *, curve: bool = False) -> list[dict[str, Any]]:
        """The metrics of every run on a test set."""
        batch, asked, size = test
        runs = self._runs
        predictions: list[list[np.ndarray]] = [[] for _ in range(runs)]
        nats, targets = np.zeros(runs), []
        for at in range(0, len(batch.inputs), size):
            part = Asked(*(field[at : at + size] for field in batch))
            if asked.answers is None:
                found, cost = (
                    x.reshape(runs, *part.targets.shape) for x in jax.device_get(self._answers(parameters, part))
                )
                targets.append(part.targets)
            else:
                odds, cost = jax.device_get(self._probabilities(parameters, part))
                odds = odds.reshape(runs, *part.targets.shape, -1)
                number = int(asked.answers.max()) + 1
                votes = [voted(asked.answers[at : at + size], part.targets, one, number) for one in odds]
                found, cost = [vote for _, vote in votes], cost.reshape(runs, *part.targets.shape)
                targets.append(votes[0][0])
            for run in range(runs):
                predictions[run].append(found[run])
                nats[run] += np.sum(cost[run], where=part.targets != IGNORED)
        scored = asked._replace(targets=np.concatenate(targets))
        loss = nats / np.sum(batch.targets != IGNORED)
        return [
            _metrics(scored, np.concatenate(parts), float(one), curve)
            for parts, one in zip(predictions, loss, strict=True)
        ]


class _Test(NamedTuple):
    """A test set: what the model is given, what its answers are held to, and how many sequences go at once."""

    batch: Asked
    asked: Examples
    size: int


def _make_test(examples: Examples) -> _Test:
    batch = _asked(examples)
    gathered = Examples(
        inputs=batch.inputs,
        targets=batch.targets,
        legal=None if examples.legal is None else np.take_along_axis(examples.legal, batch.places[..., None], axis=1),
        answers=None if examples.answers is None else np.take_along_axis(examples.answers, batch.places, axis=1),
    )
    size = min(max(TEST_TOKENS // batch.inputs.shape[1], 1), len(batch.inputs))
    return _Test(batch, gathered, size)


def _asked(examples: Examples, places: int | None = None) -> Asked:
    """Gathers what is asked where that is at most half of all positions, which spares the head the rest."""
    asked = examples.targets != IGNORED
    most = places or int(asked.sum(axis=1).max())
    length = examples.targets.shape[1]
    if 2 * most > length:
        whole = np.broadcast_to(np.arange(length, dtype=np.int32), examples.targets.shape)
        return Asked(examples.inputs, whole, examples.targets)
    where = np.argsort(~asked, axis=1, kind="stable")[:, :most].astype(np.int32)
    return Asked(examples.inputs, where, np.take_along_axis(examples.targets, where, axis=1))


def _batches(group: Group, start: int) -> Iterator[Asked]:
    """The batches [seeds, batch, ...] from a step on; each depends on seed and step alone. Made one step ahead."""
    sweep = group.sweep
    probe = draw(group.task, 1024, split="train", seed=TEST_SEED)
    most = int((probe.targets != IGNORED).sum(axis=1).max())
    equal = bool(((probe.targets != IGNORED).sum(axis=1) == most).all())
    places = most if equal else probe.targets.shape[1]
    size = sweep.train_examples or 0
    fixed = {seed: draw(group.task, size, split="train", seed=(seed, 0)) for seed in sweep.seeds if size}

    def one(seed: int, step: int) -> Asked:
        if not size:
            return _asked(draw(group.task, sweep.batch_size, split="train", seed=(seed, 1, step)), places)
        epoch, place = divmod(step, size // sweep.batch_size)
        order = np.random.default_rng([seed, 2, epoch]).permutation(size)
        return _asked(fixed[seed].take(order[place * sweep.batch_size :][: sweep.batch_size]), places)

    def batch(step: int) -> Asked:
        return Asked(*map(np.stack, zip(*(one(seed, step) for seed in sweep.seeds), strict=True)))

    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(batch, start)
        for step in range(start, sweep.steps):
            ready, ahead = ahead, pool.submit(batch, step + 1)
            yield ready.result()


def _metrics(examples: Examples, predictions: np.ndarray, loss: float, curve: bool) -> dict[str, Any]:
    hits = right(examples, predictions)
    found: dict[str, Any] = {
        "token": round(token_accuracy(hits), 5),
        "sequence": round(sequence_accuracy(hits), 5),
        "macro": round(macro_accuracy(examples, hits), 5),
        "loss": round(loss, 5) if np.isfinite(loss) else None,
        "bits": round(loss / np.log(2), 5) if np.isfinite(loss) else None,
    }
    if curve and hits.shape[1] > 1:
        places = np.unique(np.linspace(0, hits.shape[1] - 1, CURVE_POINTS).round().astype(int))
        asked = ~np.isnan(hits).all(axis=0)[places]
        found["curve"] = {
            "position": (places[asked] + 1).tolist(),
            "token": np.nanmean(hits[:, places[asked]], axis=0).round(4).tolist(),
            "so far": cumulative_accuracy(hits)[places[asked]].round(4).tolist(),
        }
    return found


def _note(group: Group, record: _Record, step: int, losses: np.ndarray, scores: list[dict[str, Any]]) -> None:
    """Adds an evaluation to the runs that go on, and ends those that have reached their goal or are lost."""
    for run, score in enumerate(scores):
        if record.active[run]:
            loss = float(losses[run])
            finite = bool(np.isfinite(loss))
            record.history[run].append({"step": step, "train_loss": round(loss, 5) if finite else None, **score})
            record.steps[run] = step
            record.active[run] = finite and not reached(group, score)


def reached(group: Group, score: dict[str, Any]) -> bool:
    """Whether a score ends a run early."""
    goal, value = group.sweep.stop_at, score[group.metric]
    if goal is None or value is None:
        return False
    return value <= goal if group.metric in LOWER_IS_BETTER else value >= goal


def _line(group: Group, record: _Record) -> str:
    values = [history[-1][group.metric] for history in record.history]
    text = " ".join("nan" if value is None else f"{value:.3f}" for value in values)
    return f"{group.metric} {text}"


def _abstract(state: TrainState) -> TrainState:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)
