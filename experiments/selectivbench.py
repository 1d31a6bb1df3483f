"""SelectivBench, states of a random grammar from ambiguous letters: `python -m experiments.selectivbench [--scale ...]`."""

from dataclasses import dataclass

from delta_jax.data.tasks import SelectivBench
from delta_jax.training import OptimizerConfig
from experiments.harness import Arm, Cell, Claim, Results, Study, Sweep, Verdict, arm, main, mixer
from experiments.harness.comparisons import better, gla, mamba2

COMPLEXITY, MEMORY, DISTRACTORS = "complexity", "memory", "distractors"
DELTA, GATED, PRODUCT, GLA, MAMBA = "DeltaNet", "Gated DeltaNet", "DeltaProduct, n_h = 4", "GLA", "Mamba-2"
ATTENTION = "softmax attention"


@dataclass(frozen=True, kw_only=True)
class GrammarSweep(Sweep):
    """A sweep with the sizes of grammars.

    Attributes:
        ambiguity: letters, and states of each.
        elements: of a sequence.
        starts: start states.
        gaps: frames of blanks that a model of the memory task is tested on, trained with 1 to the first.
    """

    ambiguity: int = 40
    elements: int = 200
    starts: int = 4
    gaps: tuple[int, ...] = (10, 20, 50, 100)


def arms(sweep: GrammarSweep) -> tuple[Arm, ...]:
    """With and without a decay, with and without the delta rule, and attention."""
    return (
        arm(DELTA, sweep, mixer("delta_net", sweep, expand_v=2.0)),
        arm(GATED, sweep, mixer("gated_delta_net", sweep, expand_v=2.0)),
        arm(GLA, sweep, gla(sweep, expand_v=2.0)),
        arm(MAMBA, sweep, mamba2(sweep, expand_v=2.0)),
        arm(PRODUCT, sweep, mixer("delta_product", sweep, num_householder=4, expand_v=2.0)),
        arm(ATTENTION, sweep, mixer("attention", sweep)),
    )


def cells(sweep: GrammarSweep) -> tuple[Cell, ...]:
    """Letters and gaps of one frame; gaps of any length with noise, tested on longer ones; letters that mean nothing."""

    def task(**changes: object) -> SelectivBench:
        sizes = {"ambiguity": sweep.ambiguity, "elements": sweep.elements, "starts": sweep.starts}
        return SelectivBench(**(sizes | changes))  # type: ignore[arg-type]

    first = sweep.gaps[0]
    noisy = task(gap=(1, first), noise=0.2)
    longer = {f"gaps of {gap}": task(gap=(gap, gap), noise=0.2) for gap in sweep.gaps}
    strange = task(distractors=0.1, distractors_from=sweep.elements // 4)
    return (
        Cell(name=COMPLEXITY, task=task(), tests={COMPLEXITY: task()}),
        Cell(name=MEMORY, task=noisy, tests={f"gaps of 1 to {first}": noisy} | longer),
        Cell(name=DISTRACTORS, task=strange, tests={DISTRACTORS: strange}),
    )


def enough(results: Results) -> Verdict:
    """Whether a decay without the delta rule names as many states."""
    one, other = (results.best(COMPLEXITY, name, COMPLEXITY, "token") for name in (GLA, GATED))
    return Verdict(f"GLA {one}, Gated DeltaNet {other}", one.mean > other.mean - 0.02)


PAPER = GrammarSweep(
    learning_rates=(5e-4, 1e-3, 2e-3),
    seeds=(0, 1, 2, 3),
    steps=3125,
    batch_size=64,
    test_examples=1000,
    evaluate_every=625,
    hidden_size=384,
    num_heads=4,
    num_layers=8,
    intermediate_size=0,
    dtype="bfloat16",
    optimizer=OptimizerConfig(warmup_steps=476, initial_ratio=0.0, final_ratio=0.0, beta2=0.999, clip_norm=1.0),
)

STUDY = Study(
    name="selectivbench",
    title="SelectivBench",
    source="SelectivBench (arXiv 2601.12598), its four tasks",
    text="The hidden state of a grammar at every element, from letters that each stand for as many states as there are "
    "letters; the frames of an element vote. Generalisation is the memory task's model on longer gaps. The published code "
    "gives training sequences as test sequences, so none of its numbers is put here; ours never meet. Blocks here are "
    "pre-norm and without dropout, theirs post-norm with 0.2. The scale cpu has a toy grammar and its first task alone: "
    "6 letters with 6 states each in place of 40 with 40, 40 elements, two layers of 64.",
    metric="token",
    show=("token",),
    scales={
        "cpu": PAPER.but(
            cells=(COMPLEXITY,),
            arms=(DELTA, GATED, GLA, ATTENTION),
            learning_rates=(3e-3, 1e-2),
            seeds=(0, 1, 2),
            steps=500,
            batch_size=32,
            test_examples=128,
            evaluate_every=125,
            hidden_size=64,
            num_heads=2,
            head_dim=16,
            num_layers=2,
            dtype="float32",
            ambiguity=6,
            elements=40,
            starts=2,
            optimizer=OptimizerConfig(warmup_steps=50, final_ratio=0.0, beta2=0.999, clip_norm=1.0),
        ),
        "gpu": PAPER.but(
            cells=(COMPLEXITY,),
            arms=(DELTA, GATED, GLA, ATTENTION),
            learning_rates=(1e-3,),
            seeds=(0, 1),
            hidden_size=256,
            test_examples=512,
        ),
        "paper": PAPER,
    },
    arms=arms,
    cells=cells,
    claims=(
        Claim(
            text="SelectivBench: the delta rule is not needed where every letter counts (GLA within 2 points)",
            paper="abstract, no number",
            judge=enough,
        ),
        Claim(
            text="SelectivBench: the delta rule is needed for gaps longer than those of training",
            paper="abstract, no number",
            judge=better(MEMORY, GATED, GLA, test=-1),
        ),
        Claim(
            text="SelectivBench: a decay helps memory (Gated DeltaNet over DeltaNet)",
            paper="abstract, no number",
            judge=better(MEMORY, GATED, DELTA),
        ),
        Claim(
            text="SelectivBench: softmax attention is better than Gated DeltaNet",
            paper="abstract, no number",
            judge=better(COMPLEXITY, ATTENTION, GATED),
        ),
    ),
    plot="steps",
)

if __name__ == "__main__":
    main(STUDY)
