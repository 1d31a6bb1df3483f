"""How a stack of layers is cut into runs of a repeating block."""

import random

import pytest

from delta_jax.models.stack import Run, cut_into_runs


def cut(text, period):
    return [("".join(run.block), run.repeats) for run in cut_into_runs(text, period)]


@pytest.mark.parametrize(
    ("text", "period", "runs"),
    [
        ("d" * 24, 1, [("d", 24)]),
        ("ds" * 6, 2, [("ds", 6)]),
        ("ds", 2, [("ds", 1)]),
        ("dd" * 3, 2, [("d", 6)]),
        ("da" + "d" * 10 + "a" + "d" * 11, 1, [("da", 1), ("d", 10), ("a", 1), ("d", 11)]),
        ("gggm" * 12, 4, [("gggm", 12)]),
        ("Kkkm" + "kkkm" * 5 + "kkm", 4, [("K", 1), ("kkmk", 6), ("km", 1)]),
        ("msg" * 4 + "m", 3, [("msg", 4), ("m", 1)]),
    ],
)
def test_what_repeats_becomes_one_run(text, period, runs):
    assert cut(text, period) == runs


def test_runs_joined_are_the_stack():
    draw = random.Random(0)
    for _ in range(200):
        text = "".join(draw.choices("ab", k=draw.randint(1, 20)))
        runs = cut_into_runs(text, draw.randint(1, 5))
        assert "".join("".join(run.block) * run.repeats for run in runs) == text
        assert all(isinstance(run, Run) and run.repeats > 0 for run in runs)
