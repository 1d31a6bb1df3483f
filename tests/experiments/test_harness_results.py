"""What is no result is named in one sentence, by the reader and by the report, which then writes nothing."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from experiments.harness.layout import misfit
from experiments.harness.results import read
from experiments.parity import STUDY
from experiments.report import main

COMMITTED = Path(__file__).parents[2] / "docs" / "results" / "parity" / "cpu"
NAME = "parity.DeltaNet_beta_in_0_2.json"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The results of one study."""
    shutil.copytree(COMMITTED, tmp_path / "docs" / "results" / "parity" / "cpu")
    return tmp_path / "docs" / "results"


def _everything(root: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in root.parent.rglob("*") if path.is_file()}


def _edited(edit: Callable[[dict[str, Any]], object]) -> str:
    table = json.loads((COMMITTED / NAME).read_text())
    edit(table)
    return json.dumps(table)


BROKEN = {
    "not JSON": ('{"cell": ', "Expecting value"),
    "nested without end": ("[" * 100_000, "recursion"),
    "a list": ("[]", "it should be a table that holds something"),
    "an empty table": ("{}", "it should be a table that holds something"),
    "another table": ('{"order": 0}', "study is missing"),
    "another study": (_edited(lambda table: table.update(study="mad")), "study should be 'parity', and is 'mad'"),
    "another scale": (_edited(lambda table: table.update(scale="gpu")), "scale should be 'cpu', and is 'gpu'"),
    "no runs": (_edited(lambda table: table.update(runs=[])), "runs should be a list that holds something"),
    "a seed that is none": (
        _edited(lambda table: table["runs"][1].update(seed="one")),
        "runs.1.seed should be int, and is 'one'",
    ),
    "a score that is none": (
        _edited(lambda table: table["runs"][0]["tests"]["80"].update(token=None)),
        "runs.0.tests.80.token should be int or float, and is None",
    ),
    "no learning rates": (
        _edited(lambda table: table["config"]["sweep"].pop("learning_rates")),
        "config.sweep.learning_rates is missing",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_named(kind: str, root: Path) -> None:
    text, words = BROKEN[kind]
    path = root / "parity" / "cpu" / NAME
    path.write_text(text)
    with pytest.raises(ValueError, match=f"results in {path} cannot be read: ") as raised:
        read(path.parent, STUDY.layout("cpu"))
    assert words in str(raised.value) and "\n" not in str(raised.value)


def test_a_folder_in_place_of_a_file_and_a_copy_are_named(root: Path) -> None:
    folder = root / "parity" / "cpu"
    (folder / "a.json").mkdir()
    with pytest.raises(ValueError, match=r"a\.json cannot be read: .*Is a directory"):
        read(folder)
    (folder / "a.json").rmdir()
    shutil.copy(folder / NAME, folder / "copy.json")
    with pytest.raises(ValueError, match=r"copy\.json and .*beta_in_0_2\.json hold results of the same runs"):
        read(folder)


def test_all_committed_results_are_what_they_should_be() -> None:
    assert len(read(COMMITTED, STUDY.layout("cpu"))) == len(list(COMMITTED.glob("*.json"))) > 0


@pytest.mark.parametrize(
    ("found", "layout", "words"),
    [
        ({"a": {"b": True}}, {"a": {"b": int}}, "a.b should be int, and is True"),
        ({"a": [1, "x"]}, {"a": [int]}, "a.1 should be int, and is 'x'"),
        ({"x": 1, "y": None}, {str: int}, "y should be int, and is None"),
        ({"a": 1, "more": 2}, {"a": int, "b?": int}, None),
        ({"a": 1, "b": "x"}, {"a": int, "b?": int}, "b should be int, and is 'x'"),
    ],
)
def test_a_misfit(found: Any, layout: Any, words: str | None) -> None:
    assert misfit(found, layout) == words


def test_the_report_of_what_is_there(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([], root)
    first = _everything(root)
    assert capsys.readouterr().out.startswith(f"{root.parent}/results.md: ")
    assert b"![Parity, parity](results/parity/cpu/parity.png)" in first[str(root.parent / "results.md")]
    main([], root)
    assert _everything(root) == first


@pytest.mark.parametrize(("arguments", "code"), [(["--help"], 0), (["results"], 2), (["--scale", "cpu"], 2)])
def test_the_report_writes_nothing_for_a_mistake(
    arguments: list[str], code: int, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = _everything(root)
    with pytest.raises(SystemExit) as stopped:
        main(arguments, root)
    assert stopped.value.code == code
    assert "usage: python -m experiments.report" in "".join(capsys.readouterr())
    assert _everything(root) == before


def _nothing(root: Path) -> None:
    shutil.rmtree(root / "parity")


def _broken(root: Path) -> None:
    (root / "parity" / "cpu" / NAME).write_text("{")


def _of_no_experiment(root: Path) -> None:
    (root / "parity" / "moon").mkdir()
    (root / "parity" / "moon" / "one.json").write_text("{}")


def _no_timing(root: Path) -> None:
    (root / "speedup" / "cpu").mkdir(parents=True)
    (root / "speedup" / "cpu" / "one.json").write_text('{"order": 0}')


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_nothing, "there are no results in {root}"),
        (_broken, "results in {root}/parity/cpu/" + NAME + " cannot be read"),
        (_of_no_experiment, "{root}/parity/moon/one.json belongs to no experiment"),
        (_no_timing, "results in {root}/speedup/cpu/one.json cannot be read: head_size is missing"),
    ],
)
def test_the_report_names_what_it_cannot_read(
    damage: Callable[[Path], None], words: str, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(root)
    before = _everything(root)
    with pytest.raises(SystemExit) as stopped:
        main([], root)
    err = capsys.readouterr().err
    assert stopped.value.code == 2
    assert err.startswith("report: ") and words.format(root=root) in err and err.count("\n") == 1
    assert _everything(root) == before
