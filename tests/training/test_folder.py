"""Whatever lies in a run's folder beside the checkpoints: repaired with a warning that names it, and never in the way."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest
import tokenizers

from delta_jax.config import load_config
from delta_jax.data import load_tokenizer
from delta_jax.training import TrainConfig, restore_model, train
from delta_jax.training.folder import keep_tokenizer, kept_tokenizer
from delta_jax.training.metrics import EVALUATION, TRAINING, MetricsWriter, read_metrics

Table = Callable[..., dict[str, Any]]


def _line(step: int) -> bytes:
    return b'{"step": %d, "loss": 1.5, "bits_per_byte": 2.5}\n' % step


FAULTS = [
    (b"\n", "line 3 is empty"),
    (b"\0\0\0\0", "line 3 is empty"),
    (b"\xff\xfe\n", "line 3 is not UTF-8"),
    (b'{"step": 3, "lo', "line 3 is no JSON"),
    (b"[3]\n", "line 3 is no entry with step, loss and bits_per_byte"),
    (b"null\n", "line 3 is no entry"),
    (b'{"step": 3}\n', "line 3 is no entry"),
    (b'{"step": "3", "loss": 1.0, "bits_per_byte": 1.0}\n', "line 3 is no entry"),
    (b'{"step": 3, "loss": "x", "bits_per_byte": 1.0}\n', "line 3 holds what is no number"),
    (b'{"step": 3, "loss": 1%s, "bits_per_byte": 1.0}\n' % (b"0" * 400), "line 3 holds what is no number"),
    (_line(2), "line 3 repeats step 2"),
    (b"[" * 100_000, "line 3 is no JSON"),
]


@pytest.mark.parametrize("name", [TRAINING, EVALUATION])
def test_a_damaged_log_is_repaired_and_kept_aside(name: str, tmp_path: Path) -> None:
    for number, (fault, message) in enumerate(FAULTS):
        output = tmp_path / str(number)
        output.mkdir()
        damaged = _line(1) + _line(2) + fault
        (output / name).write_bytes(damaged)
        with pytest.warns(UserWarning, match=rf"{name} was repaired: {message}.*{output}/damaged/{name}"):
            writer = MetricsWriter(output, 5)
        with writer:
            writer.write(name, 6, {"loss": 1.0, "bits_per_byte": 2.0})
        assert [entry["step"] for entry in read_metrics(output / name)] == [1, 2, 6]
        assert (output / "damaged" / name).read_bytes() == damaged


def test_a_fault_between_lines_costs_that_line_alone(tmp_path: Path) -> None:
    (tmp_path / TRAINING).write_bytes(_line(1) + b"\n\0\n\xff\n{\n\n" + _line(2).rstrip())
    with pytest.warns(
        UserWarning, match=r"line 2 is empty; .*line 4 is not UTF-8; line 5 is no JSON; and 1 more; the f"
    ):
        MetricsWriter(tmp_path, 5).__exit__(None, None, None)
    assert [entry["step"] for entry in read_metrics(tmp_path / TRAINING)] == [1, 2]


def test_a_log_without_a_checkpoint_is_set_aside(tmp_path: Path) -> None:
    (tmp_path / TRAINING).write_bytes(_line(1))
    (tmp_path / EVALUATION).write_bytes(_line(0))
    with pytest.warns(UserWarning, match="its run has no checkpoint and begins anew"):
        MetricsWriter(tmp_path, 0).__exit__(None, None, None)
    assert not read_metrics(tmp_path / TRAINING) + read_metrics(tmp_path / EVALUATION)
    assert (tmp_path / "damaged" / TRAINING).read_bytes() == _line(1)


SIDE_FILES = ("config.json", "metrics.jsonl", "evaluation.jsonl", "curve.png")


def _replace(path: Path, by: str) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    if by == "a folder":
        (path / "within").mkdir(parents=True)
    elif by != "nothing":
        path.write_bytes({"an empty file": b"", "half of it": b'{"step": 1, "lo', "zeros": b"\0" * 50}[by])


@pytest.mark.parametrize("by", ["nothing", "an empty file", "half of it", "zeros", "a folder"])
def test_no_side_file_stands_in_the_way(by: str, uninterrupted: Path, table: Table) -> None:
    output = Path(table()["output"])
    shutil.copytree(uninterrupted, output)
    for name in SIDE_FILES:
        _replace(output / name, by)
    if by == "a folder":
        _replace(output / "tensorboard", "an empty file")
        (output / "metrics.tmp").mkdir()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = train(load_config(TrainConfig, table()), devices=jax.devices()[:1], progress=False)
    assert (result.step, result.interrupted) == (40, False)
    said = " ".join(str(warning.message) for warning in caught)
    told = {
        "a folder": {*SIDE_FILES, "tensorboard", "metrics.tmp"},
        "half of it": {"metrics.jsonl", "evaluation.jsonl"},
    }
    for name in told.get(by, told["half of it"] if by == "zeros" else set()):
        assert str(output / name) in said
        assert (output / "damaged" / name).exists()
    assert json.loads((output / "config.json").read_text())["steps"] == 40
    assert [entry["step"] for entry in result.evaluations] == [40]  # its evaluation was lost, and made again
    assert (output / "curve.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("digests", [[], None, {}, "x", 3, {"a": 1}, {"parameters/d": "0"}])
def test_digests_of_another_type(digests: Any, uninterrupted: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    shutil.copytree(uninterrupted, output)
    (output / "checkpoints" / "40" / "digests.json").write_text(json.dumps(digests))
    with pytest.warns(UserWarning, match=r"checkpoint 40 is damaged \(digests.json does not list the files of param"):
        restore_model(output)


def test_what_is_no_checkpoint_among_checkpoints(uninterrupted: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    shutil.copytree(uninterrupted, output)
    (output / "checkpoints" / "007").mkdir()
    (output / "checkpoints" / "notes").write_text("")
    (output / "checkpoints" / "50").write_text("")
    with pytest.warns(
        UserWarning, match=r"using checkpoint 40 .*checkpoint 50 is damaged \(digests.json is unreadable\)"
    ):
        restore_model(output)


def test_the_run_keeps_its_tokenizer(tmp_path: Path) -> None:
    output, given = tmp_path / "run", tmp_path / "given.json"
    output.mkdir()
    given.write_text("a tokenizer")
    wanted = keep_tokenizer(output, str(given))
    copy = output / "tokenizer.json"
    given.write_text("another one")
    assert kept_tokenizer(output, str(given), wanted) == str(copy)
    assert copy.read_text() == "a tokenizer"
    for fault in ("is not what the run was trained with", "is missing"):
        copy.write_text("") if "not" in fault else copy.unlink()
        with pytest.raises(ValueError, match=rf"tokenizer.json {fault}, and neither is .*given.json: put"):
            kept_tokenizer(output, str(given), wanted)
        given.write_text("a tokenizer")
        with pytest.warns(UserWarning, match=rf"tokenizer.json {fault}: using .*given.json, which is"):
            assert kept_tokenizer(output, str(given), wanted) == str(given)
        given.write_text("another one")
    with pytest.warns(
        UserWarning, match="keeps no tokenizer of its own, an older version trained it: using .*given.json"
    ):
        assert kept_tokenizer(output, str(given), None) == str(given)
    assert keep_tokenizer(output, "bytes") is None
    assert kept_tokenizer(output, "bytes", None) == "bytes"


def test_a_run_is_read_with_the_tokenizer_it_was_trained_with(
    table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From another folder, in which the path it was trained with names another tokenizer."""

    def make(folder: str, characters: list[str]) -> Path:
        ids = {character: index for index, character in enumerate(["<|endoftext|>", *characters])}
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(ids, []))
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        tokenizer.add_special_tokens(["<|endoftext|>"])
        (tmp_path / folder).mkdir()
        tokenizer.save(str(tmp_path / folder / "mine.json"))
        return tmp_path / folder

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    here, elsewhere = make("here", alphabet), make("elsewhere", alphabet[::-1])
    changed = table(data={**table()["data"], "tokenizer": "mine.json"}, evaluate_every=1000)
    config = load_config(TrainConfig, changed)
    monkeypatch.chdir(here)
    train(config, devices=jax.devices()[:1], progress=False)
    monkeypatch.chdir(elsewhere)
    restored, _ = restore_model(config.output)
    assert restored.data.tokenizer == str(Path(config.output) / "tokenizer.json")
    assert load_tokenizer(restored.data.tokenizer).decode([1 + alphabet.index("g")]) == "g"
    with pytest.raises(ValueError, match=r"the data is not what checkpoint 40 .* was trained on: .*tokenizer"):
        train(config, devices=jax.devices()[:1], progress=False)
    copy = {**changed["data"], "tokenizer": restored.data.tokenizer}
    assert (
        train(load_config(TrainConfig, changed | {"data": copy}), devices=jax.devices()[:1], progress=False).step == 40
    )


def test_a_damaged_copy_of_the_tokenizer_is_made_again(tmp_path: Path) -> None:
    (tmp_path / "given.json").write_text("a tokenizer")
    (tmp_path / "tokenizer.json").write_text("a tok")
    with pytest.warns(UserWarning, match=r"tokenizer.json is not .*given.json: it was moved to .*damaged"):
        keep_tokenizer(tmp_path, str(tmp_path / "given.json"))
    assert (tmp_path / "tokenizer.json").read_text() == "a tokenizer"


def test_files_set_aside_do_not_replace_each_other(tmp_path: Path) -> None:
    for text in (b"[1]\n", b"[2]\n"):
        (tmp_path / TRAINING).write_bytes(text)
        with pytest.warns(UserWarning, match="repaired"):
            MetricsWriter(tmp_path, 5).__exit__(None, None, None)
    assert sorted(path.read_text() for path in (tmp_path / "damaged").iterdir()) == ["[1]\n", "[2]\n"]
