"""What is impossible is said in one sentence, with exit code 2, before anything trains; `--list` trains nothing."""

import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_study import STUDY

from experiments import demo, speedup
from experiments.harness import main, results, runner
from experiments.report import studies


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
        ("seeds=[1, 1]", "seeds must hold at least one value, and none twice, got [1, 1]"),
        ("seeds=[]", "seeds must hold at least one value"),
        ("seeds=[-1]", "seeds must hold numbers of 0 and more, got [-1]"),
        ("seeds=[1099511627776]", "seeds must be from 0 to 4294967295, got [1099511627776]"),
        ("seeds=[0.0]", "seeds.0: wanted an integer, got 0.0"),
        ("seeds=3", "seeds: wanted an array, got 3"),
        ("learning_rates=[]", "learning_rates must hold at least one value"),
        ("learning_rates=[1e-3, nan]", "learning_rates.1: wanted a finite number"),
        ("learning_rates=[1e400]", "learning_rates.0: wanted a finite number"),
        ("learning_rates=[1e39]", "learning_rates must be positive numbers that float32 holds"),
        ("learning_rates=[1e-40]", "learning_rates must be positive numbers that float32 holds"),
        ("learning_rates=[0.0]", "learning_rates must hold positive numbers"),
        ("learning_rates=[0.1, 0.1]", "learning_rates must hold at least one value, and none twice"),
        ("learning_rates=[-0.1]", "learning_rates must hold positive numbers"),
        ("weight_decays=[inf]", "weight_decays.0: wanted a finite number"),
        ("weight_decays=[-0.1]", "weight_decays must hold numbers of 0 and more"),
        ("weight_decays=[0.1, 0.10000001]", "two groups of runs would both be short.rotary.wd0.1.json"),
        ("checkpoint_minutes=nan", "checkpoint_minutes: wanted a finite number"),
        ("stop_at=inf", "stop_at: wanted a finite number"),
        ("arms=[]", "arms must hold at least one value"),
        ("optimizer.learning_rate=1.0", "optimizer.learning_rate is set by every run: give learning_rates"),
        ("optimizer=3", "optimizer: wanted a table, got 3"),
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
    for command in ([], ["--list"]):
        with pytest.raises(SystemExit) as stopped:
            main(STUDY, ["--output", "results", *command])
        assert stopped.value.code == 2
        assert capsys.readouterr().err.startswith("tiny: results in results/short.rotary.json cannot be read: ")
    assert (tmp_path / "results" / "short.rotary.json").read_text() == '{"cell": '


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--scale", "moon"], "argument --scale: invalid choice: 'moon'"),
        (["--lists"], "unrecognized arguments: --lists"),
        (["--output", ""], "argument --output: wanted a folder"),
    ],
)
def test_an_unknown_option(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(STUDY, arguments)
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("study", [*studies(), speedup.STUDY], ids=lambda study: study.name)
def test_help(study: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stopped:
        runner.parse(study, ["--help", "--scale", "cpu"])
    assert stopped.value.code == 0
    assert f"usage: python -m experiments.{study.name}" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("arguments", "code"), [(["--help"], 0), (["--steps", "3"], 2), (["steps=0"], 2)])
def test_the_demo(
    arguments: list[str], code: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["demo", *arguments])
    with pytest.raises(SystemExit) as stopped:
        demo.main()
    assert stopped.value.code == code
    out, err = capsys.readouterr()
    assert "python -m experiments.demo" in out + err if arguments != ["steps=0"] else err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (OSError(28, "No space left on device"), 2, "No space left on device"),
        (MemoryError("Unable to allocate 4 PiB"), 1, "Unable to allocate 4 PiB"),
        (KeyboardInterrupt(), 130, "interrupted; the same command goes on from here"),
    ],
)
def test_what_happens_on_the_way_is_one_sentence(
    error: BaseException, code: int, words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def train_group(*_: Any) -> None:
        raise error

    monkeypatch.setattr(runner, "train_group", train_group)
    with pytest.raises(SystemExit) as stopped:
        main(STUDY, ["--output", "results"])
    assert stopped.value.code == code
    err = capsys.readouterr().err
    assert words in err and err.startswith("tiny: ") and err.count("\n") == 1


def test_what_another_process_is_at_is_left_to_it(capsys: pytest.CaptureFixture[str]) -> None:
    group = STUDY.groups("cpu", STUDY.scales["cpu"].but(arms=("rotary",), cells=("short",)))[0]
    with results.locked(runner.SCRATCH / "locks" / f"tiny-{results.digest(group)}") as mine:
        assert mine
        main(STUDY, ["--output", "results", 'arms=["rotary"]', 'cells=["short"]'])
    out = capsys.readouterr().out
    assert "short.rotary: another process is at it" in out and "1 left to other processes" in out


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
