"""Runs trained side by side are the runs trained alone, and those that end early or are lost stand still."""

import dataclasses
from pathlib import Path
from typing import Any

import optax
import pytest
from tiny_study import STUDY, SWEEP, Echo, EchoByVote

from experiments.harness import training
from experiments.harness.study import Group
from experiments.harness.training import train_group

RATES = (SLOW, FAST, LOST) = (1e-5, 3e-3, 1e30)
"""Too slow to reach the goal, fast enough, and lost at once."""

GOAL = 0.95


def _group(**changes: Any) -> Group:
    return STUDY.groups("cpu", SWEEP.but(arms=("no positions",), cells=("short",), stop_at=GOAL, **changes))[0]


def _train(group: Group, folder: Path) -> dict[tuple[float, int], Any]:
    outcome = train_group(group, folder, lambda *_: None)
    return {(run["learning_rate"], run["seed"]): run for run in outcome["runs"]}


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[float, int], Any]:
    return _train(_group(learning_rates=RATES), tmp_path_factory.mktemp("together"))


def test_a_run_among_others_is_the_run_alone(together: Any, tmp_path: Path) -> None:
    rate, seed = FAST, 1
    (alone,) = _train(_group(learning_rates=(rate,), seeds=(seed,)), tmp_path).values()
    among = together[rate, seed]
    assert (among["steps"], among["reached"]) == (alone["steps"], alone["reached"])
    assert [entry["step"] for entry in among["history"]] == [entry["step"] for entry in alone["history"]]
    for one, other in zip(among["history"], alone["history"], strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], abs=3e-5)
        assert one["loss"] == pytest.approx(other["loss"], abs=3e-5)
        assert one["token"] == pytest.approx(other["token"], abs=0.005)
    for name in ("8", "16"):
        assert among["tests"][name]["loss"] == pytest.approx(alone["tests"][name]["loss"], abs=3e-5)


def test_a_run_that_reached_its_goal_keeps_its_parameters(together: Any) -> None:
    for seed in (0, 1):
        slow, fast = together[SLOW, seed], together[FAST, seed]
        assert fast["reached"] and fast["steps"] < slow["steps"] == SWEEP.steps and not slow["reached"]
        last = fast["history"][-1]
        assert last["step"] == fast["steps"] and last["token"] >= GOAL
        assert {name: fast["tests"]["8"][name] for name in ("token", "loss")} == {
            name: last[name] for name in ("token", "loss")
        }


def test_a_lost_run_ends_and_harms_no_other(together: Any) -> None:
    for seed in (0, 1):
        lost = together[LOST, seed]
        assert lost["steps"] < SWEEP.steps and not lost["reached"]
        assert lost["history"][-1]["train_loss"] is None


def test_seeds_and_rates_make_different_runs(together: Any) -> None:
    first = {key: run["history"][0]["train_loss"] for key, run in together.items()}
    assert first[SLOW, 0] != first[SLOW, 1]
    assert first[SLOW, 0] != first[FAST, 0]


def test_a_test_set_curve_has_every_position(together: Any) -> None:
    curve = together[FAST, 0]["tests"]["16"]["curve"]
    assert curve["position"] == list(range(1, 17))
    assert together[FAST, 0]["tests"]["16"]["token"] == pytest.approx(sum(curve["token"]) / 16, abs=1e-3)


def test_a_vote_of_one_position_is_its_answer(tmp_path: Path) -> None:
    tests = {"alone": Echo(), "by vote": EchoByVote()}
    group = dataclasses.replace(_group(learning_rates=(FAST,), seeds=(0,), steps=5, evaluate_every=5), tests=tests)
    (run,) = _train(group, tmp_path).values()
    assert run["tests"]["by vote"] == run["tests"]["alone"]
    assert 0 < run["tests"]["alone"]["token"] < 1


def test_an_optimizer_that_is_not_proportional_to_the_learning_rate_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    training.require_proportional(SWEEP.optimizer)
    for made in (
        lambda config, _: optax.adamw(config.learning_rate**2),
        lambda config, _: optax.chain(optax.adam(config.learning_rate), optax.add_decayed_weights(-0.1)),
    ):
        monkeypatch.setattr(training, "make_optimizer", made)
        with pytest.raises(ValueError, match="right only for an optimizer whose update is proportional"):
            training.require_proportional(SWEEP.optimizer)
