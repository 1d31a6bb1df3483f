"""What a run writes, and every way it refuses to start or stops."""

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_runs import counted_traces, run_table

from delta_jax.config import load_config
from delta_jax.data import DataError, train_batches, validation_batches
from delta_jax.evaluation import evaluate
from delta_jax.models.loss import token_nats
from delta_jax.training import NonFiniteLossError, TrainConfig, TrainResult, restore_model, train

Table = Callable[..., dict[str, Any]]


def _train(table: dict[str, Any], count: int = 1) -> TrainResult:
    return train(load_config(TrainConfig, table), devices=jax.devices()[:count], progress=False)


@pytest.fixture(scope="module")
def counted(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainResult, dict[str, int]]:
    table = run_table(corpus, tmp_path_factory.mktemp("short"), steps=12, evaluate_every=6)
    with counted_traces() as counts:
        return _train(table | {"checkpoint": {"every": 2, "keep_last": 1, "keep_every": 4}}), counts


@pytest.fixture(scope="module")
def short(counted: tuple[TrainResult, dict[str, int]]) -> TrainResult:
    return counted[0]


def test_a_run_builds_its_model_twice_and_traces_each_step_once(counted: tuple[TrainResult, dict[str, int]]) -> None:
    """For its structure and for its first parameters; twelve steps and three evaluations do not trace again."""
    assert counted[1] == {"__init__": 2, "features_and_loads": 2}


def test_a_run_writes_what_it_promises(short: TrainResult) -> None:
    output = short.output
    assert (short.step, short.interrupted) == (12, False)
    assert [entry["step"] for entry in short.training] == list(range(1, 13))
    assert set(short.training[0]) == {
        "step", "loss", "bits_per_byte", "gradient_norm", "learning_rate", "tokens", "tokens_per_second",
    }  # fmt: skip
    assert [entry["step"] for entry in short.evaluations] == [0, 6, 12]
    assert short.evaluations[0]["bits_per_byte"] == pytest.approx(np.log2(264), rel=0.02)
    assert (output / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((output / "config.json").read_text())["steps"] == 12
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == ["12", "4", "8"]


def test_bits_per_byte_of_a_step_are_those_of_its_own_bytes(short: TrainResult) -> None:
    config = load_config(TrainConfig, json.loads((short.output / "config.json").read_text()))
    batches = train_batches(config.data, batch_size=config.batch_size, sequence_length=config.sequence_length)
    for entry, batch in zip(short.training, batches, strict=False):
        text = int((batch["targets"] < 256).sum())
        assert entry["bits_per_byte"] == pytest.approx(entry["loss"] * batch["mask"].sum() / np.log(2) / text)


def test_tensorboard_holds_the_same_numbers(short: TrainResult) -> None:
    events = EventAccumulator(str(short.output / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(e["step"], e["loss"]) for e in short.training]
    assert [e.step for e in events.Scalars("validation/bits_per_byte")] == [0, 6, 12]


def test_the_model_comes_back_from_the_output_folder(short: TrainResult) -> None:
    config, model = restore_model(short.output)
    assert config.steps == 12
    logits = model(jax.numpy.zeros((1, 5), jax.numpy.int32))
    assert logits.shape == (1, 5, 264)
    assert bool(jax.numpy.isfinite(logits).all())


def test_restore_model_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not the output folder of a training run"):
        restore_model(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="there is no checkpoint in"):
        restore_model(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, r"is of another run, set another output folder: seed: 0 there, 1 here"),
        ({"batch_size": 8}, r"batch_size: 4 there, 8 here"),
        ({"data.shuffle_rows": 4}, r"data\.shuffle_rows: 16 there, 4 here"),
        ({"model.hidden_size": 32}, r"model\.hidden_size: 16 there, 32 here"),
        (
            {"model.pattern.0.mixer": '"gated_delta_net"'},
            r"model\.pattern\.0\.mixer: 'delta_net' there, 'gated_delta_net' here",
        ),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(
    changes: dict[str, Any], message: str, short: TrainResult, corpus: Path
) -> None:
    config = load_config(
        TrainConfig, run_table(corpus, short.output), [f"{key}={value}" for key, value in changes.items()]
    )
    with pytest.raises(ValueError, match=message):
        train(config, devices=jax.devices()[:1], progress=False)


def test_more_steps_continue_a_finished_run(short: TrainResult, corpus: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    _train(run_table(corpus, output, steps=4, evaluate_every=100))
    with counted_traces() as counts:
        result = _train(run_table(corpus, output, steps=6, evaluate_every=100))
    assert counts == {"__init__": 1, "features_and_loads": 2}
    assert [entry["step"] for entry in result.training] == [1, 2, 3, 4, 5, 6]


def test_an_output_folder_that_cannot_be_written(table: Table, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r'output: the folder ".*/file/run" cannot be written \(Not a directory\)'):
        _train(table(output=str(tmp_path / "file" / "run")))


def test_a_vocabulary_smaller_than_the_tokenizers(table: Table) -> None:
    config = load_config(TrainConfig, table(), ["model.vocab_size=256"])
    with pytest.raises(ValueError, match=r"model\.vocab_size is 256, but the tokenizer bytes has 257 ids"):
        train(config, progress=False)


def test_a_batch_that_does_not_divide(table: Table) -> None:
    with pytest.raises(ValueError, match=r"is 2: wanted a multiple of the 8 parts .*data=8 x fsdp=1"):
        _train(table(gradient_accumulation=2), count=8)
    with pytest.raises(ValueError, match=r"batch_size \(4\) should be a multiple of gradient_accumulation \(3\)"):
        _train(table(gradient_accumulation=3))


def test_a_loss_that_is_not_finite_stops_the_run(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    """A product overflows in the twelfth step, after which no number of it is finite."""
    from delta_jax.training import loop

    real = loop.set_up

    def poisoned(*arguments: Any) -> Any:
        setup = real(*arguments)

        def step(state: Any, batch: Any) -> Any:
            new, metrics = setup.train_step(state, batch)
            if int(new.step) == 12:
                new, metrics = jax.tree.map(lambda x: x * jnp.nan if x.dtype == jnp.float32 else x, (new, metrics))
            return new, metrics

        return dataclasses.replace(setup, train_step=step)

    monkeypatch.setattr(loop, "set_up", poisoned)
    config = load_config(TrainConfig, table())
    with pytest.raises(NonFiniteLossError, match=r"loss nan .*at step 12 .*checkpoint 10 .*intact; .*learning_rate"):
        train(config, devices=jax.devices()[:1], progress=False)
    output = Path(config.output)
    assert sorted(int(path.name) for path in (output / "checkpoints").iterdir()) == [5, 10]
    assert np.load(output / "non_finite_step_12.npz")["inputs"].any()
    assert [json.loads(line)["step"] for line in (output / "metrics.jsonl").read_text().splitlines()] == list(
        range(1, 12)
    )
    monkeypatch.setattr(loop, "set_up", real)
    result = train(config, devices=jax.devices()[:1], progress=False)
    assert [entry["step"] for entry in result.training] == list(range(1, 41))
    assert all(np.isfinite(entry["loss"]) for entry in result.training)


def test_an_evaluation_of_the_loop_is_that_of_the_library(short: TrainResult) -> None:
    config, model = restore_model(short.output)
    batches = validation_batches(config.data, batch_size=config.batch_size, sequence_length=config.sequence_length)
    result = evaluate(model, itertools.islice(batches, config.evaluation_batches))
    last = short.evaluations[-1]
    assert (last["step"], last["loss"]) == (12, pytest.approx(result.loss, rel=1e-6))
    assert last["bits_per_byte"] == pytest.approx(result.bits_per_byte, rel=1e-6)


def test_a_validation_split_without_a_target_is_a_fault_of_the_data(
    table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    from delta_jax.training import loop

    monkeypatch.setattr(loop, "validation_batches", lambda *a, **k: [])
    with pytest.raises(DataError, match=r"evaluating on the validation split failed: .* no target to evaluate on"):
        _train(table())


def test_a_learning_rate_that_explodes_stops_before_the_first_checkpoint(table: Table) -> None:
    optimizer = {"learning_rate": 1e38, "clip_norm": None}
    with pytest.raises(NonFiniteLossError, match="no checkpoint was written yet"):
        _train(table(optimizer=optimizer, checkpoint={"every": 1000}))


def test_the_loss_sums_float32_logits_of_a_bfloat16_model() -> None:
    logits = jax.numpy.full((1, 2, 3), 100.0, jax.numpy.bfloat16)
    total = token_nats(logits, jax.numpy.zeros((1, 2), jax.numpy.int32)).sum()
    assert total.dtype == jax.numpy.float32
    assert float(total) == pytest.approx(2 * np.log(3), rel=1e-5)
