"""A study that trains in seconds; `python tiny_study.py ARGUMENTS` runs it in a process of its own."""

from dataclasses import dataclass

import numpy as np

from delta_jax.data.tasks import Examples, Split
from experiments.harness import Arm, Cell, Claim, Results, Study, Sweep, Verdict, arm, mixer


@dataclass(frozen=True, kw_only=True)
class Echo:
    """Every token is to be repeated at once: learnt in a few steps at a high learning rate."""

    length: int = 8
    vocab_size: int = 6
    chance: float = 1 / 6

    def sample(self, rng: np.random.Generator, number: int, split: Split) -> Examples:
        tokens = rng.integers(0, self.vocab_size, (number, self.length), np.int32)
        return Examples(tokens, tokens)


@dataclass(frozen=True, kw_only=True)
class EchoByVote(Echo):
    """The same, where every answer is put to a vote of one position."""

    def sample(self, rng: np.random.Generator, number: int, split: Split) -> Examples:
        examples = super().sample(rng, number, split)
        return examples._replace(answers=np.broadcast_to(np.arange(self.length), examples.targets.shape))


@dataclass(frozen=True, kw_only=True)
class TinySweep(Sweep):
    """With the name of a mixer to override."""

    mixer: str = "attention"


def arms(sweep: TinySweep) -> tuple[Arm, ...]:
    """The same mixer with and without positions; attention, as nothing compiles faster."""
    return tuple(
        arm(name, sweep, mixer(sweep.mixer, sweep, rope_fraction=fraction))
        for name, fraction in (("rotary", 1.0), ("no positions", 0.0))
    )


def cells(sweep: TinySweep) -> tuple[Cell, ...]:
    """Two lengths; the first is tested on both."""
    short, long = Echo(), Echo(length=16)
    return (
        Cell(name="short", task=short, tests={"8": short, "16": long}),
        Cell(name="long", task=long, tests={"16": long}),
    )


def above(level: float):
    """A claim about accuracy on the short cell."""

    def judge(results: Results) -> Verdict:
        found = results.best("short", "rotary", "8", "token")
        return Verdict(f"accuracy {found}", found.low > level)

    return judge


SWEEP = TinySweep(
    learning_rates=(1e-4, 3e-3),
    seeds=(0, 1),
    steps=40,
    batch_size=16,
    test_examples=32,
    evaluate_every=5,
    hidden_size=16,
    num_heads=1,
    intermediate_size=0,
)

STUDY = Study(
    name="tiny",
    title="Echoes",
    source="Nobody et al., table 0",
    text="Cut to the bone.",
    metric="token",
    show=("token", "loss"),
    scales={"cpu": SWEEP, "gpu": SWEEP.but(steps=400)},
    arms=arms,
    cells=cells,
    claims=(
        Claim(text="It echoes", paper="1.00", judge=above(0.5)),
        Claim(text="It echoes perfectly", paper="1.0000", judge=above(1.0)),
        Claim(text="Nobody knows", paper="", judge=lambda results: Verdict("overlapping", None)),
        Claim(
            text="Of an arm that is not there",
            paper="2 / 3",
            judge=lambda results: Verdict("", results.best("short", "gamma", "8", "token").low > 0),
        ),
    ),
    published={("short", "rotary"): "99.9 %"},
    plot="positions",
)

if __name__ == "__main__":
    from experiments.harness import main

    main(STUDY)
