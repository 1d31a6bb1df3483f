"""Permutations of five from swaps alone (Grazzi et al. 2024): `python -m experiments.swaps [--scale ...] [--list]`."""

from dataclasses import dataclass
from typing import Any

from delta_jax.data.tasks import WordProblem
from delta_jax.training import OptimizerConfig
from experiments.harness import Arm, Cell, Claim, Results, Study, Sweep, Verdict, arm, main, mixer

SWAPS = "S5, swaps only"
POSITIVE, NEGATIVE = "DeltaNet, beta in (0, 1)", "DeltaNet, beta in (0, 2)"


@dataclass(frozen=True, kw_only=True)
class SwapSweep(Sweep):
    """A sweep with the lengths of S5.

    Attributes:
        length: elements of a training sequence.
        stretches: lengths of the tests, as multiples of it.
        variants: which ways of showing S5.
    """

    length: int = 32
    stretches: tuple[int, ...] = (1, 2, 4)
    variants: tuple[str, ...] = (SWAPS,)


def arms(sweep: SwapSweep) -> tuple[Arm, ...]:
    """Both ranges of beta, in one layer and, at the paper's scale, in five."""
    found = []
    for name, negative in ((NEGATIVE, True), (POSITIVE, False)):
        spec = mixer("delta_net", sweep, allow_negative_eigenvalues=negative, use_short_conv=False)
        found.append(arm(name, sweep, spec))
        if sweep.num_layers > 1:
            found.append(arm(f"{name}, {sweep.num_layers} layers", sweep, spec))
            found[-2] = arm(name, sweep.but(num_layers=1), spec)
    return tuple(found)


def cells(sweep: SwapSweep) -> tuple[Cell, ...]:
    """Swaps only, all elements, elements that move at most three points, and four tokens for each element."""
    options: dict[str, dict[str, Any]] = {
        SWAPS: {"swaps_only": True},
        "S5": {},
        "S5, at most 3 moved": {"limit_to_3": True},
        "S5, 4 tokens an element": {"tokens_per_element": 4},
    }

    def cell(name: str) -> Cell:
        if name not in options:
            raise ValueError(f"variants must be among {', '.join(options)}, got {name!r}")
        length = sweep.length * (2 if "4 tokens" in name else 1)
        problems = [WordProblem(group="S5", elements=length * factor, **options[name]) for factor in sweep.stretches]
        return Cell(name=name, task=problems[0], tests={str(problem.elements): problem for problem in problems})

    return tuple(cell(name) for name in sweep.variants)


def solved(results: Results) -> Verdict:
    """At twice the length; four times is reported."""
    _, double, longest, *_ = results.tests(SWAPS)
    found, far = (results.best(SWAPS, NEGATIVE, test, "sequence") for test in (double, longest))
    return Verdict(f"whole sequences at {double}: {found}; at {longest}: {far}", found.low >= 0.98)


def unsolved(results: Results) -> Verdict:
    """Not one whole sequence."""
    first = results.tests(SWAPS)[0]
    highest = max(results.every(SWAPS, POSITIVE, first, "sequence"))
    token = results.best(SWAPS, POSITIVE, first, "token")
    return Verdict(f"whole sequences at {first}: at most {highest:.3f} of any run; accuracy {token}", highest < 0.01)


CPU = SwapSweep(
    learning_rates=(3e-3, 1e-2),
    steps=600,
    batch_size=32,
    test_examples=256,
    evaluate_every=100,
    hidden_size=64,
    num_heads=4,
    intermediate_size=64,
)
PAPER = SwapSweep(
    learning_rates=(1e-4,),
    weight_decays=(0.01,),
    steps=312_500,
    batch_size=512,
    train_examples=1_600_000,
    test_examples=40_000,
    evaluate_every=3125,
    hidden_size=128,
    num_layers=5,
    stretches=(1, 2, 4, 8, 15),
    variants=(SWAPS, "S5", "S5, at most 3 moved", "S5, 4 tokens an element"),
    optimizer=OptimizerConfig(final_ratio=0.0, beta2=0.999, clip_norm=1.0),
)

STUDY = Study(
    name="swaps",
    title="Permutations from swaps",
    source="Grazzi et al., Unlocking state-tracking in linear RNNs through negative eigenvalues (arXiv 2411.12537), S5",
    text="The product so far of transpositions (or the identity) of five things, 120 answers, asked after every swap. The "
    "paper trains on 1.6 million sequences of 32 with hidden size 128 and tests to 500.",
    metric="token",
    show=("token", "sequence"),
    scales={
        "cpu": CPU,
        "gpu": PAPER.but(
            learning_rates=(3e-4, 1e-3),
            seeds=(0, 1, 2),
            steps=5000,
            num_layers=1,
            train_examples=None,
            test_examples=1000,
            evaluate_every=500,
        ),
        "paper": PAPER,
    },
    arms=arms,
    cells=cells,
    claims=(
        Claim(
            text="Products of swaps: one layer with beta in (0, 2) learns them and carries over to twice the length",
            paper="learnt fully, to 500 (figure)",
            judge=solved,
        ),
        Claim(
            text="Products of swaps: beta in (0, 1) does not leave zero",
            paper="5 layers barely exceed the training length (figure)",
            judge=unsolved,
        ),
    ),
    published={
        (SWAPS, NEGATIVE): "learnt, to 500",
        (SWAPS, POSITIVE): "not learnt",
    },
    plot="positions",
)

if __name__ == "__main__":
    main(STUDY)
