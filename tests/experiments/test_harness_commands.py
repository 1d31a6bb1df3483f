"""What is impossible is said in one sentence, with exit code 2, before anything trains; `--list` trains nothing."""

from pathlib import Path
from typing import Any

import pytest
from tiny_study import STUDY

from experiments.harness import main, runner


@pytest.fixture(autouse=True)
def no_training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In a folder of its own, where training is an error."""

    def train_group(*_: Any) -> None:
        raise AssertionError("trained")

    monkeypatch.setattr(runner, "train_group", train_group)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("stepz=3", 'unknown key "stepz" (did you mean steps?'),
        ("steps=many", "steps"),
        ("steps=0", "steps must be at least 1, got 0"),
        ("seeds=[1, 1]", "seeds must hold at least one number, none negative and none twice"),
        ("learning_rates=[]", "learning_rates must hold at least one number"),
        ("optimizer.beta2=2.0", "beta2"),
        ("train_examples=3", "train_examples must be at least batch_size"),
        ("steps", 'override "steps" should read a.b.c=value'),
        ('arms=["gamma"]', "arms names 'gamma', which this experiment has not, only rotary, no positions"),
        ('cells=["square"]', "cells names 'square', which this experiment has not, only short, long"),
        ("mixer=perceptron", "mixer must be one of attention, delta_net"),
        ("mixer=delta_net", "mixer 'delta_net' has no option 'rope_fraction'"),
        ("num_heads=3", "num_heads"),
    ],
)
def test_an_impossible_override(argument: str, words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(STUDY, ["--output", "results", argument])
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert words in err and err.startswith("tiny: ") and err.count("\n") == 1 and not out
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stopped:
        main(STUDY, ["--output", "file/results"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "tiny: output folder file/results cannot be written: Not a directory\n"


def test_results_that_cannot_be_read(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "short.rotary.json").write_text('{"cell": ')
    with pytest.raises(SystemExit) as stopped:
        main(STUDY, ["--output", "results"])
    assert stopped.value.code == 2
    assert "results/short.rotary.json cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--scale", "moon"], ["--lists"]])
def test_an_unknown_option(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(STUDY, arguments)
    assert stopped.value.code == 2
    assert arguments[-1] in capsys.readouterr().err


def test_the_list_names_what_would_run_and_its_cost(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    main(STUDY, ["--list", "--scale", "gpu", "--output", "results", "seeds=[0, 1, 2]"])
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if "2 rate(s) x 3 seeds" in line]
    assert [("short" in line, "rotary" in line) for line in lines] == [
        (a, b) for a in (True, False) for b in (True, False)
    ]
    parameters = 2 * 6 * 16 + 4 * 16 * 16 + 2 * 16
    flops = 6 * parameters * 400 * 16 * 8 * 6
    assert all(f"{parameters:,}" in line and "400" in line and "to do" in line for line in lines)
    assert all(word in out for word in ("minutes", "TFLOP", "assumed"))
    seconds = 1.5 * 4 * flops / (16 * runner.ASSUMED_RATES["cpu"])
    assert f"About {seconds / 60:.0f} minutes to do" in out
    assert not (tmp_path / "results").exists()
