"""What a resumed run may change is printed, what it may not is refused in a sentence; the corpus is known by its content."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest
from training_runs import losses, run_table

from delta_jax.config import load_config, to_dict
from delta_jax.data import DataError
from delta_jax.training import TrainConfig, TrainResult, train
from delta_jax.training.resume import note_fault, resumption

Table = Callable[..., dict[str, Any]]

# Two fingerprints of `delta_jax.data.fingerprint`.
SAME = {"documents": 3, "files": 1, "bytes": 9, "names": "n", "sizes": "s", "content": "c", "tokenizer": "bytes"}
OTHER = SAME | {"documents": 4}


def _resumption(output: Path, overrides: list[str], old: dict[str, Any] | None = SAME, new: Any = SAME) -> list[str]:
    table = run_table(output / "corpus", output)
    about = {"config": to_dict(load_config(TrainConfig, table)), **({"fingerprint": old} if old else {})}
    return resumption(10, about, load_config(TrainConfig, table, overrides), new, output)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optimizer.learning_rate=1e-3", "optimizer.learning_rate 0.01 -> 0.001"),
        ("optimizer.schedule=wsd", "optimizer.schedule 'cosine' -> 'wsd'"),
        ("optimizer.weight_decay=0.5", "optimizer.weight_decay 0.01 -> 0.5"),
        ("optimizer.clip_norm=null", "optimizer.clip_norm 1.0 -> null"),
        ("steps=60", "steps 40 -> 60"),
        ("model.remat=block", "model.remat 'none' -> 'block'"),
        ("model.dtype=bfloat16", "model.dtype 'float32' -> 'bfloat16'"),
        ("model.pattern.0.implementation=xla", "model.pattern.0.implementation 'recurrent' -> 'xla'"),
        ("model.pattern.0.chunk_size=16", "model.pattern.0.chunk_size 'absent' -> 16"),
        ("gradient_accumulation=2", "gradient_accumulation 1 -> 2"),
        ("mesh.fsdp=2", "mesh.fsdp 1 -> 2"),
        ("checkpoint.every=7", "checkpoint.every 5 -> 7"),
        ("log_every=7", "log_every 1 -> 7"),
        ("evaluate_every=7", "evaluate_every 20 -> 7"),
        ("evaluation_batches=7", "evaluation_batches 2 -> 7"),
        ("output=elsewhere", "output '"),
        ("data.path=elsewhere", "data.path '"),
    ],
)
def test_what_may_change_is_printed(override: str, said: str, tmp_path: Path) -> None:
    (line,) = _resumption(tmp_path, [override])
    assert line.startswith(f"from here on: {said}")
    assert "," not in line  # nothing else


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.num_layers=3", "model.num_layers: 2 there, 3 here"),
        ("model.vocab_size=300", "model.vocab_size: 264 there, 300 here"),
        ("model.norm_eps=1e-3", "model.norm_eps: 1e-06 there, 0.001 here"),
        ("model.param_dtype=bfloat16", "model.param_dtype: 'float32' there, 'bfloat16' here"),
        (
            "model.pattern.0.allow_negative_eigenvalues=true",
            "model.pattern.0.allow_negative_eigenvalues: 'absent' there",
        ),
        ("sequence_length=64", "sequence_length: 32 there, 64 here"),
        ("batch_size=8", "batch_size: 4 there, 8 here"),
        ("seed=1", "seed: 0 there, 1 here"),
        ("data.seed=1", "data.seed: 0 there, 1 here"),
        ("data.validation_fraction=0.2", "data.validation_fraction: 0.1 there, 0.2 here"),
        ("data.text_field=body", "data.text_field: 'text' there, 'body' here"),
    ],
)
def test_what_may_not_change_is_refused(override: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=rf"^checkpoint 10 in \S+ is of another run, set another .*: {re.escape(message)}"
    ):
        _resumption(tmp_path, [override, "changed_data=allow"])


def test_nothing_changed_says_nothing(tmp_path: Path) -> None:
    assert _resumption(tmp_path, []) == []
    assert _resumption(tmp_path, ["changed_data=allow"]) == []


def test_fewer_steps_than_are_done(tmp_path: Path) -> None:
    assert _resumption(tmp_path, ["steps=10"]) == ["from here on: steps 40 -> 10"]
    with pytest.raises(
        ValueError, match=r"^steps is 9, but checkpoint 10 in \S+ is past it: nothing is left to train$"
    ):
        _resumption(tmp_path, ["steps=9"])


def test_other_content_is_refused_and_allowed_on_request(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"^the data is not what checkpoint 10 .* trained on: .*4.*changed_data=allow: the"
    ):
        _resumption(tmp_path, [], new=OTHER)
    (line,) = _resumption(tmp_path, ["changed_data=allow"], new=OTHER)
    assert line.startswith("the data has changed, as changed_data=allow lets it: ")
    assert "the place in the data is kept" in line


def test_whoever_mends_a_document_may_go_on(tmp_path: Path) -> None:
    note_fault(tmp_path, 9, "a.txt, line 3: not JSON.")
    with pytest.raises(ValueError, match="the data is not what"):
        _resumption(tmp_path, [], new=OTHER)  # the fault was at another step
    note_fault(tmp_path, 10, "a.txt, line 3: not JSON.")
    (line,) = _resumption(tmp_path, [], new=OTHER)
    assert line.startswith("the data has changed since the run stopped (a.txt, line 3: not JSON): ")
    for nothing in ("", "[]", "null", '{"step": 10}', "\0"):
        (tmp_path / "data_fault.json").write_text(nothing)
        with pytest.raises(ValueError, match="the data is not what"):
            _resumption(tmp_path, [], new=OTHER)


def test_a_checkpoint_without_a_fingerprint(tmp_path: Path) -> None:
    (line,) = _resumption(tmp_path, [], old=None)
    assert line == "the checkpoint is older than fingerprints of the data: the corpus is taken to be the one it was"
    with pytest.raises(ValueError, match=r"data\.path: .* there, 'elsewhere' here"):
        _resumption(tmp_path, ["data.path=elsewhere"], old=None)
    assert len(_resumption(tmp_path, ["data.path=elsewhere", "changed_data=allow"], old=None)) == 2


def test_a_configuration_of_another_version(tmp_path: Path) -> None:
    config = load_config(TrainConfig, run_table(tmp_path, tmp_path))
    old = to_dict(config)
    del old["changed_data"], old["evaluation_batches"]
    about = {"config": old, "fingerprint": SAME}
    assert resumption(10, about, config, SAME, tmp_path) == ["from here on: evaluation_batches null -> 2"]
    old["unheard_of"] = 1
    with pytest.raises(ValueError, match=r'checkpoint 10 in \S+ has a conf.* cannot read: unknown key "unheard_of"'):
        resumption(10, about, config, SAME, tmp_path)


def _train(table: dict[str, Any]) -> TrainResult:
    return train(load_config(TrainConfig, table), devices=jax.devices()[:1])


def test_the_optimizer_changes_under_way(
    corpus: Path, uninterrupted: Path, table: Table, capsys: pytest.CaptureFixture[str]
) -> None:
    """Clipping and its absence have one structure of state; the learning rate is the new one from the next step on."""
    output = Path(table()["output"])
    shutil.copytree(uninterrupted, output)
    result = _train(table(steps=42, optimizer={"learning_rate": 0.5, "clip_norm": None}))
    assert [entry["step"] for entry in result.training] == list(range(1, 43))
    assert result.training[40]["learning_rate"] > 10 * result.training[39]["learning_rate"]
    said = capsys.readouterr().out
    assert "14,112 parameters on 1 cpu device(s), mesh data 1, fsdp 1, sequence 1, tensor 1\n" in said
    assert f"{corpus}: 20 documents, of which 0.1 are held out\n42 steps of 128 tokens: 4 sequences of 32" in said
    optimizer = ("learning_rate 0.01 -> 0.5", "warmup_steps 4 -> 0", "clip_norm 1.0 -> null")
    changed = [
        "steps 40 -> 42",
        *(f"optimizer.{change}" for change in optimizer),
        f"output '{uninterrupted}' -> '{output}'",
    ]
    assert f"continuing from checkpoint 40 in {output}; from here on: {', '.join(changed)}\n" in said
    assert re.search(r"^compiling the training step  \d:\d\d:\d\d$", said, re.MULTILINE)
    assert re.search(r"^step 42/42  loss .* tokens/s  \d:\d\d:\d\d$", said, re.MULTILINE)


def test_a_corpus_is_what_it_holds(
    corpus: Path, uninterrupted: Path, table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, moved = Path(table()["output"]), tmp_path / "moved"
    shutil.copytree(uninterrupted, output)
    shutil.copytree(corpus, moved)
    monkeypatch.chdir(tmp_path)

    def resume(path: str, **changes: Any) -> int:
        return _train(table(data={**table()["data"], "path": path}, **changes)).step

    for path in (str(moved), "moved", "moved/../moved/", "moved/*.txt"):
        assert resume(path) == 40
    for file in moved.iterdir():
        file.write_text(file.read_text().upper())
    before = (output / "config.json").read_bytes()
    with pytest.raises(ValueError, match="the data is not what checkpoint 40 in"):
        resume("moved")
    assert (output / "config.json").read_bytes() == before
    assert resume("moved", changed_data="allow") == 40


class _Failing:
    """An iterator that fails once it has given some batches."""

    def __init__(self, inner: Any, batches: int, error: Exception):
        self._inner, self._left, self._error = inner, batches, error
        self.skipped: dict[str, int] = {}

    def __next__(self) -> Any:
        if not self._left:
            raise self._error
        self._left -= 1
        self.skipped = {"not JSON": 7 - self._left}
        return next(self._inner)

    def get_state(self) -> Any:
        return self._inner.get_state()

    def set_state(self, state: Any) -> None:
        self._inner.set_state(state)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (DataError("a.txt, line 3: not JSON."), r"^a\.txt, line 3: not JSON\.$"),
        (RuntimeError("of\nsome library"), r"^reading the data failed: RuntimeError: of some library$"),
        (StopIteration(), r"^reading the data failed: StopIteration: $"),
        (OSError(5, "I/O"), r"^reading the data failed: OSError: \[Errno 5\] I/O$"),
    ],
)
def test_whatever_the_data_raises_saves(
    error: Exception,
    message: str,
    uninterrupted: Path,
    table: Table,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from delta_jax.training import loop

    real, output = loop.train_batches, Path(table()["output"])
    changes = {"checkpoint": {"every": 1000}}
    monkeypatch.setattr(loop, "train_batches", lambda *a, **k: _Failing(real(*a, **k), 7, error))
    with pytest.raises(DataError, match=message):
        _train(table(**changes))
    said = capsys.readouterr().out
    assert f"stopped by a fault of the data after step 7, saved in {output}\n" in said
    assert "documents skipped so far: 7 (not JSON)\n" in said
    assert [step for step, _, _ in losses(output)] == list(range(1, 8))
    assert json.loads((output / "metrics.jsonl").read_text().splitlines()[-1])["skipped"] == 7

    monkeypatch.setattr(loop, "train_batches", lambda *a, **k: _Failing(real(*a, **k), 0, error))
    with pytest.raises(DataError, match=message):
        _train(table(**changes))  # not mended: nothing is lost, nothing is done
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["7"]

    if isinstance(error, DataError):
        monkeypatch.setattr(loop, "train_batches", real)
        assert _train(table(**changes)).step == 40
        assert losses(output) == losses(uninterrupted)


def test_a_fault_of_the_validation_split_saves(
    uninterrupted: Path, table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The evaluation after step 20 fails; the next start makes it."""
    from delta_jax.training import loop

    real, output = loop.validation_batches, Path(table()["output"])

    def failing(*arguments: Any, **keywords: Any) -> Any:
        if (output / "metrics.jsonl").exists() and len(losses(output)) == 20:
            raise OSError("gone")
        return real(*arguments, **keywords)

    monkeypatch.setattr(loop, "validation_batches", failing)
    with pytest.raises(DataError, match=r"^reading the validation split failed: OSError: gone$"):
        _train(table(checkpoint={"every": 1000}))
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["20"]
    monkeypatch.setattr(loop, "validation_batches", real)
    assert [entry["step"] for entry in _train(table()).evaluations] == [0, 20, 40]
    assert losses(output) == losses(uninterrupted)
    assert (output / "evaluation.jsonl").read_text() == (uninterrupted / "evaluation.jsonl").read_text()


def test_a_broken_document_is_mended_and_trained_on(tmp_path: Path) -> None:
    """Every step before it is kept, and after it come the steps of a corpus that was never broken."""
    lines = [json.dumps({"text": f"document {index} " * 10}) for index in range(60)]
    corpus, broken = tmp_path / "corpus.jsonl", 41

    def run(output: str) -> TrainResult:
        return _train(run_table(corpus, tmp_path / output, evaluate_every=1000))

    corpus.write_text("\n".join(lines) + "\n")
    run("whole")
    corpus.write_text("\n".join([*lines[:broken], lines[broken][:-1], *lines[broken + 1 :]]) + "\n")
    for _ in range(2):  # as it is, it stops the next start as well
        with pytest.raises(DataError, match=r"corpus\.jsonl"):
            run("run")
    done = len(losses(tmp_path / "run"))
    assert 0 < done < 40
    assert (tmp_path / "run" / "checkpoints" / str(done)).is_dir()
    corpus.write_text("\n".join(lines) + "\n")
    run("run")
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
