"""Fine-tuning: from the weights of a run or a Hugging Face folder, on completions, with frozen parameters and an average."""

import json
import random
import shutil
import signal
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tokenizers
from training_runs import finish, losses, run_table, start

from delta_jax.config import load_config, to_dict
from delta_jax.data import load_chat_template, load_tokenizer, validation_batches
from delta_jax.evaluation import evaluate
from delta_jax.models import LanguageModel
from delta_jax.parallel import path_string
from delta_jax.training import TrainConfig, TrainResult, restore_model, set_up, train
from delta_jax.training.initial import initial_parameters
from delta_jax.training.state import split_model

CHATML = """{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
MODEL = {
    "vocab_size": 264,
    "hidden_size": 16,
    "num_layers": 2,
    "intermediate_size": 16,
    "dtype": "float32",
    "pattern": [
        {"mixer": "delta_net", "num_heads": 2, "head_dim": 8, "implementation": "recurrent"},
        {"mixer": "attention", "num_heads": 2, "head_dim": 8},
    ],
}


def _train(table: dict[str, Any], *overrides: str) -> TrainResult:
    return train(load_config(TrainConfig, table, overrides), devices=jax.devices()[:1], progress=False)


@pytest.fixture(scope="module")
def base(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on text, of rows of 16 tokens, whose tokenizer has a chat template."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=259, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["a"], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(CHATML)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    table = run_table(corpus, tmp_path_factory.mktemp("base"), steps=4, sequence_length=16, evaluate_every=9)
    data = table["data"] | {"tokenizer": str(folder / "tokenizer.json")}
    output = _train(table | {"data": data, "model": MODEL, "checkpoint": {"every": 2}}).output
    shutil.rmtree(folder)
    return output


def _records(folder: Path, kind: str) -> str:
    draws = random.Random(1)
    words = ["".join(draws.choices("abc", k=4)) for _ in range(30)]
    file = folder / f"{kind}.jsonl"
    if kind == "completion":
        rows: list[dict[str, Any]] = [{"prompt": f"{word}?", "completion": " yes yes"} for word in words]
    else:
        roles = ("user", "assistant")
        rows = [
            {"messages": [{"role": role, "content": c} for role, c in zip(roles, (w, "yes yes"), strict=True)]}
            for w in words
        ]
    file.write_text("\n".join(map(json.dumps, rows)))
    return str(file)


def _table(base: Path, folder: Path, kind: str, **changes: Any) -> dict[str, Any]:
    """A run on records, from another run, without a model: with longer rows than that had."""
    table = run_table(Path(_records(folder, kind)), folder / "tuned", steps=12, sequence_length=40, evaluate_every=6)
    del table["model"]
    table["data"] |= {"records": kind, "validation_fraction": 0.2}
    table["optimizer"]["groups"] = [
        {"pattern": "^embed/|/mixer/", "frozen": True},
        {"pattern": "lm_head", "learning_rate_factor": 2.0},
    ]
    extra = {"initial": str(base), "ema_decay": 0.8, "checkpoint": {"every": 4, "keep_last": 3}}
    return table | extra | changes


@pytest.fixture(scope="module", params=["completion", "messages"])
def tuned(
    request: pytest.FixtureRequest, base: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], TrainResult]:
    table = _table(base, tmp_path_factory.mktemp("tuned"), request.param)
    return table, _train(table)


def _leaves(model: LanguageModel) -> dict[str, np.ndarray]:
    return {
        path_string(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(split_model(model)[1])
    }


def test_completions_are_learnt_and_frozen_parameters_stay(
    base: Path, tuned: tuple[dict[str, Any], TrainResult]
) -> None:
    table, result = tuned
    first, *_, last = (entry["loss"] for entry in result.evaluations)
    assert last < 0.8 * first
    before, after = _leaves(restore_model(base)[1]), _leaves(restore_model(result.output)[1])
    frozen = {path for path in before if path.startswith("embed/") or "/mixer/" in path}
    same = {path for path in before if before[path].tobytes() == after[path].tobytes()}
    assert same == frozen and len(frozen) > 8
    # Only answers count: " yes yes" or "yes yes" and the token that ends it.
    size = len(" yes yes") + 1 if table["data"]["records"] == "completion" else len("yes yes") + 1
    assert all(entry["tokens"] % size == 0 and entry["tokens"] > 0 for entry in result.training)


def test_the_tokenizer_comes_along_with_its_chat_template(
    base: Path, tuned: tuple[dict[str, Any], TrainResult]
) -> None:
    config, _ = restore_model(tuned[1].output)
    assert config.data.tokenizer == str(tuned[1].output / "tokenizer.json")
    template = load_chat_template(tuned[1].output)
    assert template is not None and template.source == CHATML and template.tokens == {"eos_token": "<|im_end|>"}
    assert load_tokenizer(config.data.tokenizer).vocab_size == load_tokenizer(str(base / "tokenizer.json")).vocab_size


def test_the_average_is_read_in_place_of_the_weights(base: Path, tuned: tuple[dict[str, Any], TrainResult]) -> None:
    config, model = restore_model(tuned[1].output)
    _, average = restore_model(tuned[1].output, ema=True)
    one, other = _leaves(model), _leaves(average)
    assert all(one[path].dtype == other[path].dtype for path in one)
    assert {path for path in one if one[path].tobytes() == other[path].tobytes()} == {
        path for path in one if path.startswith("embed/") or "/mixer/" in path
    }
    batches = validation_batches(config.data, batch_size=4, sequence_length=64)  # longer still than in training
    assert evaluate(average, batches).loss == pytest.approx(evaluate(model, batches).loss, rel=0.5)
    with pytest.raises(ValueError, match="has no moving average of the weights"):
        restore_model(base, ema=True)


def test_a_resume_is_exact_and_does_not_need_the_first_weights(
    base: Path, tuned: tuple[dict[str, Any], TrainResult], tmp_path: Path
) -> None:
    table, whole = tuned
    copy = shutil.copytree(whole.output, tmp_path / "copy")
    for step in ("8", "12"):
        shutil.rmtree(copy / "checkpoints" / step)
    away = base.rename(base.with_name("away"))
    try:
        result = _train(table | {"output": str(copy)})
    finally:
        away.rename(base)
    assert losses(copy) == losses(whole.output)
    assert result.evaluations == whole.evaluations
    for ema in (False, True):
        one, other = (_leaves(restore_model(folder, ema=ema)[1]) for folder in (copy, whole.output))
        assert all(one[path].tobytes() == other[path].tobytes() for path in one)


@pytest.mark.slow
def test_kill_minus_nine(tuned: tuple[dict[str, Any], TrainResult], tmp_path: Path, cache: Path) -> None:
    table, whole = tuned
    output = tmp_path / "killed"
    process = start(table | {"output": str(output)}, cache)
    metrics, deadline = output / "metrics.jsonl", time.monotonic() + 240
    while not metrics.exists() or metrics.read_text().count("\n") < 6:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    finish(process)
    code, out, err = finish(start(table | {"output": str(output)}, cache))
    assert (code, "finished 12" in out) == (0, True), err
    assert losses(output) == losses(whole.output)
    one, other = (_leaves(restore_model(folder, ema=True)[1]) for folder in (output, whole.output))
    assert all(one[path].tobytes() == other[path].tobytes() for path in one)


def test_a_run_with_an_average_does_not_go_on_without_it(
    tuned: tuple[dict[str, Any], TrainResult], tmp_path: Path
) -> None:
    table, whole = tuned
    copy = shutil.copytree(whole.output, tmp_path / "copy")
    with pytest.raises(ValueError, match=r"holds other arrays than this model and optimizer have.*ema/"):
        _train(table | {"output": str(copy), "ema_decay": None, "steps": 13})


def _load(base: Path, tmp_path: Path, *overrides: str, **changes: Any) -> TrainConfig:
    return load_config(TrainConfig, _table(base, tmp_path, "completion", **changes), overrides)


def test_weights_land_on_the_mesh_in_their_shardings(base: Path, tmp_path: Path) -> None:
    config = _load(base, tmp_path, "mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2")
    setup = set_up(config, jax.devices())
    parameters, changed = initial_parameters(config, setup.state.parameters)
    assert changed == []
    jax.tree.map(
        lambda leaf, wanted: np.testing.assert_equal(leaf.sharding, wanted.sharding), parameters, setup.state.parameters
    )
    expected = _leaves(restore_model(base)[1])
    for path, leaf in jax.tree_util.tree_leaves_with_path(parameters):
        np.testing.assert_array_equal(leaf, expected[path_string(path)])
    assert parameters["lm_head"]["kernel"].addressable_shards[0].data.shape == (8, 132)


def test_keys_of_the_model_that_leave_its_function_alone(base: Path, tmp_path: Path) -> None:
    overrides = ("model.remat=block", "model.param_dtype=bfloat16", "model.pattern.1.window=64")
    config = _load(base, tmp_path, *overrides)
    assert (config.model.remat, config.model.vocab_size) == ("block", 264)
    assert dict(config.model.pattern[1].options) == {"num_heads": 2, "head_dim": 8, "window": 64}
    setup = set_up(config, jax.devices()[:1])
    parameters, changed = initial_parameters(config, setup.state.parameters)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(parameters)} == {"bfloat16"}
    assert "model.remat: 'none' there, 'block' here" in changed and any(".window: " in line for line in changed)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model.hidden_size=32"], r"does not fit the weights of initial, .*: model\.hidden_size: 16 there, 32 here"),
        (["model.pattern.0.mixer=gated_delta_net"], r"does not fit .*model\.pattern\.0\.mixer: 'delta_net' there"),
        (["model.pattern.7.num_heads=2"], r"model: there is no entry 7, the array has 2"),
        (["initial=nowhere"], r"initial: nowhere is neither the output folder of a training run"),
        (["model.vocab_size=200"], r"model\.vocab_size is 200, but the tokenizer .* has 259 ids"),
    ],
)
def test_what_does_not_fit_is_one_sentence(base: Path, tmp_path: Path, overrides: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        _train(_table(base, tmp_path, "completion"), *overrides)


def test_a_checkpoint_is_named_by_its_folder(base: Path, tmp_path: Path) -> None:
    for step in (2, 4):
        config = _load(base, tmp_path, initial=str(base / "checkpoints" / str(step)))
        parameters, _ = initial_parameters(config, set_up(config, jax.devices()[:1]).state.parameters)
        np.testing.assert_array_equal(
            parameters["lm_head"]["kernel"], _leaves(restore_model(base, step)[1])["lm_head/kernel"]
        )
    with pytest.raises(ValueError, match="there is no checkpoint 1 in"):
        _load(base, tmp_path, initial=str(base / "checkpoints" / "1"))


@pytest.fixture
def hugging_face(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Callable[[], int]]:
    """A folder that a reader of such folders takes for one, and how often it was read."""
    folder = tmp_path / "published"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    shutil.copyfile(base / "tokenizer.json", folder / "tokenizer.json")
    reads = []

    def load_pretrained(folder: Path, *, dtype: str = "float32", param_dtype: str | None = None) -> LanguageModel:
        reads.append((folder, param_dtype))
        return restore_model(base)[1]

    module = types.SimpleNamespace(load_pretrained=load_pretrained)
    monkeypatch.setitem(sys.modules, "delta_jax.interop", module)
    return folder, lambda: len(reads)


def test_a_hugging_face_folder(base: Path, tmp_path: Path, hugging_face: tuple[Path, Callable[[], int]]) -> None:
    folder, reads = hugging_face
    config = _load(folder, tmp_path, "model.remat=block", "mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2")
    assert config.data.tokenizer == str(folder / "tokenizer.json") and config.model.remat == "block"
    setup = set_up(config, jax.devices())
    parameters, changed = initial_parameters(config, setup.state.parameters)
    assert reads() == 1 and changed == ["model.remat: 'none' there, 'block' here"]
    expected = _leaves(restore_model(base)[1])
    for path, leaf in jax.tree_util.tree_leaves_with_path(parameters):
        np.testing.assert_array_equal(leaf, expected[path_string(path)])
    assert parameters["lm_head"]["kernel"].sharding == setup.state.parameters["lm_head"]["kernel"].sharding
    (folder / "tokenizer.json").unlink()
    with pytest.raises(
        ValueError, match=r"has no tokenizer.json: name the tokenizer of these weights with data\.tokenizer"
    ):
        _load(folder, tmp_path)


def test_a_saved_configuration_does_not_ask_for_the_first_weights(base: Path, tmp_path: Path) -> None:
    saved = to_dict(_load(base, tmp_path)) | {"initial": "gone"}
    assert to_dict(load_config(TrainConfig, saved)) == saved
