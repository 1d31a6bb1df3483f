"""The page has every claim with its verdict, those that do not hold too, and says what was not run."""

from pathlib import Path
from typing import Any

import pytest
from tiny_study import STUDY

from experiments.harness.page import claim_rows, section
from experiments.harness.results import Results, read, write
from experiments.harness.study import Group
from experiments.report import times


def _scores(token: float, loss: float) -> dict[str, Any]:
    curve = {"position": [1, 2, 3, 4], "token": [1.0, 1.0, token, token], "so far": [1.0, 1.0, token, token]}
    return {"token": token, "sequence": token, "macro": token, "loss": loss, "bits": loss, "curve": curve}


def _outcome(group: Group, accuracy: dict[tuple[float, int], float]) -> dict[str, Any]:
    runs = [
        {
            "learning_rate": rate,
            "seed": seed,
            "steps": group.sweep.steps,
            "reached": False,
            "tests": {name: _scores(value, 2 - value) for name in group.tests},
            "history": [{"step": 5, "train_loss": 1.0, **_scores(value, 2 - value)}],
        }
        for (rate, seed), value in accuracy.items()
    ]
    return {"parameters": 1234, "tokens": 10, "seconds": 90.0, "cpu_seconds": 120.0, "runs": runs}


RUNS = {(1e-3, 0): 0.99, (1e-3, 1): 0.40, (3e-3, 0): 0.80, (3e-3, 1): 0.70}
"""The better learning rate on average is not that of the best run."""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Results of one architecture on the short cell and of both on the long one, at one scale."""
    folder = tmp_path / "results" / "tiny" / "cpu"
    folder.mkdir(parents=True)
    sweep = STUDY.scales["cpu"].but(learning_rates=(1e-3, 3e-3))
    for order, group in enumerate(STUDY.groups("cpu", sweep)):
        if (group.cell, group.arm) != ("short", "no positions"):
            write(folder / f"{group.name}.json", group, order, _outcome(group, RUNS), "command")
    return tmp_path / "results"


def test_every_claim_has_a_row(root: Path) -> None:
    rows = {row[0]: row[1:] for row in claim_rows(STUDY, root)}
    assert rows["It echoes"] == ["1.00", "accuracy 0.750 (0.700 to 0.800)", "cpu (2 seeds)", "holds"]
    assert rows["It echoes perfectly"][1:] == ["accuracy 0.750 (0.700 to 0.800)", "cpu (2 seeds)", "**does not hold**"]
    assert rows["Nobody knows"][1:] == ["overlapping", "cpu (2 seeds)", "cannot tell"]
    assert rows["Of an arm that is not there"] == ["2 / 3", "not run", "", "cannot tell"]


def test_a_study_that_was_not_run(tmp_path: Path) -> None:
    assert [row[2:] for row in claim_rows(STUDY, tmp_path)] == [["not run", "", "cannot tell"]] * 4
    text = section(STUDY, tmp_path)
    assert "**cpu**: not run." in text and "**gpu**: not run." in text and "|" not in text


def test_the_section_shows_what_was_run_and_what_was_not(root: Path) -> None:
    text = section(STUDY, root)
    assert text.startswith("## Echoes\n") and "Nobody et al., table 0" in text and "Cut to the bone." in text
    assert "**gpu**: not run." in text
    lines = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in text.splitlines() if line.startswith("|")}
    head = [word.strip() for word in lines[""]]
    assert head == [
        "parameters",
        "short, 8, accuracy",
        "short, 8, nats",
        "short, 16, accuracy",
        "short, 16, nats",
        "long, 16, accuracy",
        "long, 16, nats",
        "paper, short",
    ]
    rotary, other = ([word.strip() for word in lines[name]] for name in ("rotary", "no positions"))
    assert rotary[:3] == ["1,234", "0.750 (0.700 to 0.800)", "1.250 (1.200 to 1.300)"] and rotary[-1] == "99.9 %"
    assert other[1:5] == ["not run"] * 4 and other[5] == "0.750 (0.700 to 0.800)" and other[-1] == ""
    assert "learning rates 0.001, 0.003" in text and "seeds 0, 1" in text and "32 test sequences" in text
    assert "Time: 4.5 minutes, of processors 6.0." in text
    figures = sorted(path.name for path in root.rglob("*.png"))
    assert figures == ["long.png", "short.png"] and "(results/tiny/cpu/short.png)" in text


def test_what_is_read_out_of_results(root: Path) -> None:
    results = Results(read(root / "tiny" / "cpu"))
    assert results.cells == ("short", "long") and results.arms == ("rotary", "no positions")
    assert results.tests("short") == ("8", "16") and results.seeds == 2
    best = results.best("short", "rotary", "16", "token")
    assert (best.learning_rate, best.values, best.low, best.high) == (3e-3, (0.80, 0.70), 0.70, 0.80)
    assert sorted(results.every("short", "rotary", "8", "token")) == [0.40, 0.70, 0.80, 0.99]
    assert results.beyond("long", "no positions", "16", 2).values == (0.80, 0.70)
    assert results.beyond("long", "no positions", "16", 1).values == pytest.approx((2.6 / 3, 2.4 / 3))
    for impossible in (
        lambda: results.best("short", "no positions", "8", "token"),
        lambda: results.best("short", "rotary", "32", "token"),
        lambda: results.tests("square"),
    ):
        with pytest.raises(KeyError):
            impossible()


def test_learning_rates_one_after_the_other_are_read_like_those_side_by_side(root: Path, tmp_path: Path) -> None:
    together = Results(read(root / "tiny" / "cpu")).best("short", "rotary", "8", "token")
    folder = tmp_path / "alone"
    folder.mkdir()
    sweep = STUDY.scales["cpu"].but(
        learning_rates=(1e-3, 3e-3), rates_together=False, arms=("rotary",), cells=("short",)
    )
    groups = STUDY.groups("cpu", sweep)
    for order, group in enumerate(groups):
        (rate,) = group.sweep.learning_rates
        runs = {key: value for key, value in RUNS.items() if key[0] == rate}
        write(folder / f"{group.name}.json", group, order, _outcome(group, runs), "command")
    assert len(list(folder.iterdir())) == len(groups) == 2
    assert Results(read(folder)).best("short", "rotary", "8", "token") == together


def test_the_time_of_everything_is_that_of_sweeps_and_of_the_speed_up() -> None:
    text = times({"cpu": [{"seconds": 600.0, "cpu_seconds": 480.0}, {"seconds": 300.0}], "gpu": []})
    assert "cpu: 15 minutes" in text
    assert "processors 13." in text
    assert "gpu" not in text
