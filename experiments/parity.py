"""Parity needs negative eigenvalues (Grazzi et al. 2024): `python -m experiments.parity [--scale ...] [--list]`."""

from delta_jax.data.tasks import Parity
from delta_jax.models.config import MixerSpec
from delta_jax.training import OptimizerConfig
from experiments.harness import Arm, Cell, Claim, Results, Study, Sweep, Verdict, arm, main, mixer

CELL = "parity"
POSITIVE, NEGATIVE = "DeltaNet, beta in (0, 1)", "DeltaNet, beta in (0, 2)"
LONGER, DEEPER = f"{POSITIVE}, 3x the steps", f"{POSITIVE}, 2 layers, 3x the steps"


def arms(sweep: Sweep) -> tuple[Arm, ...]:
    """Both ranges of beta; the smaller one also with more steps and more layers."""

    def delta_net(negative: bool) -> MixerSpec:
        return mixer("delta_net", sweep, allow_negative_eigenvalues=negative, use_short_conv=False)

    both = arm(NEGATIVE, sweep, delta_net(True)), arm(POSITIVE, sweep, delta_net(False))
    if sweep.num_layers > 1:
        return both
    long = sweep.but(steps=3 * sweep.steps)
    deep = long.but(num_layers=2)
    return *both, arm(LONGER, long, delta_net(False)), arm(DEEPER, deep, delta_net(False))


def cells(sweep: Sweep) -> tuple[Cell, ...]:
    """Trained on 40 bits with the parity so far asked at every bit, tested up to 6.4 times as long."""

    def bits(number: int) -> Parity:
        return Parity(lengths=(number + 1, number + 1), every_token=True)

    return (Cell(name=CELL, task=bits(40), tests={str(number): bits(number) for number in (40, 80, 160, 256)}),)


def inside(results: Results) -> Verdict:
    """Every seed perfect with beta in (0, 2), none over 80 % with beta in (0, 1)."""
    good = results.best(CELL, NEGATIVE, "40", "token")
    bad = [results.every(CELL, name, "40", "token") for name in (POSITIVE, LONGER, DEEPER)]
    highest = max(max(values) for values in bad)
    return Verdict(f"{good} against at most {highest:.3f} of any run", good.low == 1.0 and highest < 0.8)


def beyond(results: Results) -> Verdict:
    """Beyond the training length, beta in (0, 1) guesses."""
    found = [results.beyond(CELL, name, "256", 40) for name in (POSITIVE, LONGER, DEEPER)]
    return Verdict("; ".join(map(str, found)), all(summary.low > 0.45 and summary.high < 0.55 for summary in found))


def extrapolation(results: Results) -> Verdict:
    """How far beta in (0, 2) carries."""
    found = results.beyond(CELL, NEGATIVE, "256", 40)
    return Verdict(f"accuracy on positions 41 to 256: {found}", True if found.low > 0.999 else None)


CPU = Sweep(
    learning_rates=(3e-3, 1e-2),
    weight_decays=(0.1,),
    steps=400,
    batch_size=32,
    test_examples=256,
    evaluate_every=100,
    hidden_size=32,
    num_heads=2,
    intermediate_size=32,
)
GPU = CPU.but(steps=2000, batch_size=256, hidden_size=128, num_heads=4, intermediate_size=None, evaluate_every=250)

STUDY = Study(
    name="parity",
    title="Parity",
    source="Grazzi et al., Unlocking state-tracking in linear RNNs through negative eigenvalues (arXiv 2411.12537), table 3",
    text="The parity of the bits read so far, asked at every bit; trained on 40 bits. The paper asks only at the end of "
    "words of 3 to 40 tokens, trains two layers with a short convolution, and scores (accuracy - 1/2) / (1/2) on 40 to 256.",
    metric="token",
    show=("token", "sequence"),
    scales={
        "cpu": CPU,
        "gpu": GPU,
        "paper": GPU.but(
            learning_rates=(1e-4, 5e-4, 1e-3, 1e-2),
            steps=100_000,
            batch_size=1024,
            num_layers=2,
            test_examples=8192,
            evaluate_every=5000,
            optimizer=OptimizerConfig(
                warmup_steps=10_000, initial_ratio=0.0, final_ratio=1e-3, beta2=0.999, clip_norm=None
            ),
        ),
    },
    arms=arms,
    cells=cells,
    claims=(
        Claim(
            text="With beta in (0, 2) one layer computes parity inside the training length, with beta in (0, 1) not",
            paper="1.000 / .017 (scaled, best of 3 seeds, lengths 40 to 256)",
            judge=inside,
        ),
        Claim(
            text="Beyond the training length beta in (0, 1) guesses, also with two layers and 3x the steps",
            paper=".010 scaled (median)",
            judge=beyond,
        ),
        Claim(
            text="With beta in (0, 2) parity carries over to 6.4x the training length",
            paper="1.000 best, .999 median (scaled)",
            judge=extrapolation,
        ),
    ),
    published={
        (CELL, NEGATIVE): "1.000 / .999 scaled, best / median",
        (CELL, POSITIVE): ".017 / .010 scaled, best / median",
    },
    plot="positions",
)

if __name__ == "__main__":
    main(STUDY)
