"""The command lines of the benchmarks: a mistake is found before anything is measured or written."""

import argparse
import importlib
import sys
from pathlib import Path

import pytest

from benchmarks.options import folder, number, seconds


@pytest.mark.parametrize(
    ("command", "code", "words"),
    [
        ("cpu --help", 0, "usage: python -m benchmarks.cpu"),
        ("cpu --rounds 0", 2, "argument --rounds: wanted a whole number of at least 1, got '0'"),
        ("cpu --seconds nan", 2, "argument --seconds: wanted a positive number, got 'nan'"),
        ("delta_product --help", 0, "usage: python -m benchmarks.delta_product"),
        ("delta_product --tokens -8", 2, "argument --tokens: wanted a whole number"),
        ("delta_product --bogus", 2, "unrecognized arguments: --bogus"),
        ("gpu --output file/figures", 2, "argument --output: cannot be written: "),
        ("gpu --only fastest", 2, "argument --only: invalid choice: 'fastest'"),
        ("gpu --cases nothing", 2, "argument --cases: none has one of ['nothing'] in its name"),
        ("gpu_check --processes 0", 2, "argument --processes: wanted a whole number of at least 1, got '0'"),
        ("gpu_check --checks nothing", 2, "argument --checks: none has one of ['nothing'] in its name"),
        ("layer --help", 0, "usage: python -m benchmarks.layer"),
        ("layer softmax", 2, "argument layer: invalid choice: 'softmax'"),
        ("tpu_schedule.__main__ --help", 0, "usage: python -m benchmarks.tpu_schedule"),
        ("tpu_schedule.__main__ v9", 2, "invalid choice: 'v9'"),
        ("tpu_schedule.layer v6e softmax", 2, "argument layer: invalid choice: 'softmax'"),
        ("tpu_schedule.calibration --help", 0, "usage: python -m benchmarks.tpu_schedule.calibration"),
    ],
)
def test_a_command(
    command: str,
    code: int,
    words: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(sys, "argv", command.split())
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(f"benchmarks.{sys.argv[0]}").main()
    assert stopped.value.code == code
    assert words in "".join(capsys.readouterr())
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_all_generations_are_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.tpu_schedule import __main__ as command

    def collect(generations: list[str], _: object) -> None:
        raise RuntimeError(", ".join(generations))

    monkeypatch.setattr(sys, "argv", ["tpu_schedule"])
    monkeypatch.setattr(command, "collect", collect)
    with pytest.raises(RuntimeError, match=f"^{', '.join(command.GENERATIONS)}$"):
        command.main()


def test_values(tmp_path: Path) -> None:
    assert (number("3"), seconds("1e-3"), folder(str(tmp_path / "a" / "b"))) == (3, 1e-3, tmp_path / "a" / "b")
    for kind, text in ((number, "1.5"), (number, ""), (seconds, "inf"), (seconds, "x"), (seconds, "-1")):
        with pytest.raises(argparse.ArgumentTypeError, match="wanted a"):
            kind(text)
