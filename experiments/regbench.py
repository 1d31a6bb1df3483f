"""RegBench, regular languages learnt in context (DeltaNet's figure): `python -m experiments.regbench --scale gpu`."""

import dataclasses
from dataclasses import dataclass

from delta_jax.data.tasks import RegBench
from delta_jax.training import OptimizerConfig
from experiments.harness import Arm, Cell, Claim, Study, Sweep, arm, main, mixer
from experiments.harness.comparisons import better, gla, mamba2

CELL = "next letter is legal"
DELTA, DELTA_PLAIN = "DeltaNet with convolution", "DeltaNet without convolution"
GLA, GLA_PLAIN = "GLA with convolution", "GLA without convolution"
MAMBA, TRANSFORMER = "Mamba-2", "Transformer++"
PUBLISHED = {
    TRANSFORMER: ("92.5", "94", "95", "95.5"),
    DELTA: ("81", "87.5", "89", "93"),
    DELTA_PLAIN: ("79", "85", "85", "92.5"),
    GLA: ("60", "85.5", "90", "93"),
    GLA_PLAIN: ("52.5", "81.5", "89.5", "93"),
}
SIZES = (2500, 5000, 10_000, 20_000)


@dataclass(frozen=True, kw_only=True)
class LanguagesSweep(Sweep):
    """A sweep over training sets; `steps` are those of the first, the others have as many epochs.

    Attributes:
        automata: sizes of the training set, each sequence from an automaton of its own.
        warmup: share of the steps.
    """

    automata: tuple[int, ...] = SIZES[:1]
    warmup: float = 0.1


def name_of(architecture: str, automata: int) -> str:
    """In tables."""
    return f"{architecture}, {automata / 1000:g}K"


def arms(sweep: LanguagesSweep) -> tuple[Arm, ...]:
    """Architectures x sizes of the training set."""
    mixers = {
        DELTA: mixer("delta_net", sweep),
        GLA: gla(sweep, expand_v=1.0),
        TRANSFORMER: mixer("attention", sweep),
        DELTA_PLAIN: mixer("delta_net", sweep, use_short_conv=False),
        GLA_PLAIN: gla(sweep, expand_v=1.0, use_short_conv=False),
        MAMBA: mamba2(sweep, expand_v=1.0),
    }

    def sized(architecture: str, size: int) -> Arm:
        steps = sweep.steps * size // sweep.automata[0]
        optimizer = dataclasses.replace(sweep.optimizer, warmup_steps=int(sweep.warmup * steps))
        changes = {"steps": steps, "train_examples": size, "optimizer": optimizer}
        return arm(name_of(architecture, size), sweep, mixers[architecture], **changes)

    return tuple(sized(architecture, size) for size in sweep.automata for architecture in mixers)


def cells(sweep: LanguagesSweep) -> tuple[Cell, ...]:
    """The benchmark's languages."""
    return (Cell(name=CELL, task=RegBench(), tests={CELL: RegBench()}),)


PAPER = LanguagesSweep(
    learning_rates=(2.5e-4, 5e-4),
    weight_decays=(0.1,),
    steps=200 * SIZES[0] // 32,
    batch_size=32,
    train_examples=SIZES[0],
    test_examples=500,
    evaluate_every=1000,
    hidden_size=256,
    num_heads=2,
    num_layers=8,
    automata=SIZES,
    optimizer=OptimizerConfig(final_ratio=0.1, beta2=0.999, clip_norm=None),
)
GPU = PAPER.but(
    seeds=(0,),
    automata=SIZES[:1],
    hidden_size=128,
    num_layers=4,
    arms=tuple(name_of(name, SIZES[0]) for name in (DELTA, GLA, TRANSFORMER)),
)

STUDY = Study(
    name="regbench",
    title="RegBench",
    source="Akyürek et al., In-context language learning (arXiv 2401.12973); Yang et al., DeltaNet "
    "(arXiv 2406.06484), its RegBench figure",
    text="Strings of a random automaton, a new one in every sequence; right is every letter that the automaton allows, and "
    "separators are not asked. The paper's numbers are read off a plot, the best of 2 to 12 layers of 64 to 1024; one size "
    "stands for those here, without the dropout of the embedding. Accuracy is the mean over sequences. "
    "At the scale cpu this only shows that it runs: 200 epochs of 2500 automata take hours on two cores.",
    metric="token",
    show=("token",),
    scales={
        "cpu": GPU.but(
            steps=20,
            batch_size=4,
            train_examples=64,
            test_examples=16,
            evaluate_every=10,
            hidden_size=32,
            num_layers=2,
            intermediate_size=32,
            arms=None,
            automata=(64,),
        ),
        "gpu": GPU,
        "paper": PAPER,
    },
    arms=arms,
    cells=cells,
    claims=(
        Claim(
            text="RegBench with 2500 automata: DeltaNet is better than GLA (both with convolution)",
            paper="81 % against 60 %",
            judge=better(CELL, name_of(DELTA, SIZES[0]), name_of(GLA, SIZES[0])),
        ),
        Claim(
            text="RegBench with 2500 automata: the convolution helps DeltaNet",
            paper="81 % against 79 %",
            judge=better(CELL, name_of(DELTA, SIZES[0]), name_of(DELTA_PLAIN, SIZES[0])),
        ),
    ),
    published={
        (CELL, name_of(name, size)): f"{value} %"
        for name, values in PUBLISHED.items()
        for size, value in zip(SIZES, values, strict=True)
    },
    answer="letter",
    plot="steps",
)

if __name__ == "__main__":
    main(STUDY)
