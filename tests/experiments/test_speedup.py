"""The table of the chunkwise form against the recurrence."""

import json
from pathlib import Path

import pytest

from experiments import speedup
from experiments.speedup import STUDY, main


@pytest.fixture(autouse=True)
def scratch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Timings that took as many milliseconds as are written here."""
    folder = tmp_path / "speedup" / "cpu"
    folder.mkdir(parents=True)
    for order, (size, factors) in enumerate({16: (2.0, 4.0), 32: (3.0, 0.5)}.items()):
        rounds = {
            length: [{"recurrent": factor * noise, "xla": 1.0} for noise in (0.9, 1.0, 1.2)]
            for length, factor in zip(("128", "512"), factors, strict=True)
        }
        table = {
            "order": order,
            "head_size": size,
            "date": "2026-01-01",
            "versions": {"jax": "1.2.3"},
            "machine": {"cpu": "Abacus", "cores": 2, "platform": "cpu", "device": "cpu", "load_before": 3.0},
            "seconds": 60.0,
            "rounds": rounds,
            "config": {"tokens": 512, "width": 32, "dtype": "float32", "rounds": 3},
        }
        (folder / f"heads_of_{size}.json").write_text(json.dumps(table))
    return tmp_path


def test_claims_that_do_not_hold_stay(root: Path) -> None:
    rows = [row[2:] for row in STUDY.claim_rows(root)]
    assert rows == [
        ["0.5x to 4.0x", "cpu", "**does not hold**"],
        ["heads of 16: 2.0x to 4.0x, heads of 32: 3.0x to 0.5x", "cpu", "**does not hold**"],
        ["T = 512: heads of 16: 4.0x, heads of 32: 0.5x", "cpu", "**does not hold**"],
    ]
    (root / "speedup" / "cpu" / "heads_of_32.json").unlink()
    assert [row[-1] for row in STUDY.claim_rows(root)] == ["holds", "holds", "cannot tell"]


def test_the_section(root: Path) -> None:
    text = STUDY.section(root)
    assert "| heads of 16 | 2.0 (1.8 to 2.4) | 4.0 (3.6 to 4.8) |" in text
    assert "| paper, heads of 64 | 4.0 |" in text and "**gpu**: not run." in text
    assert "Abacus, 2 cores, JAX 1.2.3" in text and "Time: 2.0 minutes." in text and "busy (load 3.0)" in text


def test_what_was_not_run(tmp_path: Path) -> None:
    assert [row[2:] for row in STUDY.claim_rows(tmp_path)] == [["not run", "", "cannot tell"]] * 3
    assert STUDY.section(tmp_path).count("not run.") == 3


def test_both_forms_are_timed_and_nothing_twice(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["--output", "out", "lengths=[16]", "head_sizes=[8]", "tokens=32", "width=8", "seconds=0.001", "rounds=2"]
    main(command)
    (file,) = (tmp_path / "out").iterdir()
    table = json.loads(file.read_text())
    assert [set(turn) for turn in table["rounds"]["16"]] == [{"recurrent", "xla"}] * 2
    assert all(taken > 0 for turn in table["rounds"]["16"] for taken in turn.values())
    monkeypatch.setattr(speedup, "_measure", None)
    main(command)
    main([*command, "--list"])
    assert "done" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("lengths=[100]", "lengths must hold divisors of tokens, 4096, and none twice, got (100,)"),
        ("lengths=[128, 128]", "lengths must hold divisors of tokens, 4096, and none twice"),
        ("head_sizes=[]", "head_sizes must hold divisors of width"),
        ("seconds=0", "seconds must be a positive number"),
        ("dtype=int8", "dtype must be float32 or bfloat16"),
        ("length=[128]", "unknown key"),
    ],
)
def test_an_impossible_override(argument: str, words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--output", "out", argument])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert words in error and error.startswith("speedup: ") and error.count("\n") == 1
    assert not list(tmp_path.iterdir())
