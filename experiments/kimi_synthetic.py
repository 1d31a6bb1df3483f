"""Palindrome, recall and stacks (Kimi Linear, figure 4): `python -m experiments.kimi_synthetic [--scale ...] [--list]`."""

from collections.abc import Callable
from dataclasses import dataclass

from delta_jax.data.tasks import MultiQueryRecall, Palindrome, Stacks, Task
from experiments.harness import Arm, Cell, Claim, Results, Study, Sweep, Verdict, arm, main, mixer
from experiments.harness.comparisons import mamba2

KDA, GATED, DELTA, MAMBA = "Kimi Delta Attention", "Gated DeltaNet", "DeltaNet", "Mamba-2"
PALINDROME, RECALL, STACK = "palindrome", "recall", "stacks"


@dataclass(frozen=True, kw_only=True)
class KimiSweep(Sweep):
    """A sweep with the sizes of the three tasks.

    Attributes:
        tasks: which of the three.
        lengths: tokens of a sequence, or up to two less; every length is trained by itself.
        palindrome_tokens: different tokens of the palindrome, SEPARATOR among them.
        recall_tokens: of the recall, SEPARATOR among them.
        stacks, elements: of the stacks.
    """

    tasks: tuple[str, ...] = (PALINDROME, RECALL, STACK)
    lengths: tuple[int, ...] = (256, 512, 1024, 2048)
    palindrome_tokens: int = 128
    recall_tokens: int = 2048
    stacks: int = 64
    elements: int = 64


def name_of(task: str, length: int) -> str:
    """A cell in tables."""
    return f"{task}, {length}"


def arms(sweep: KimiSweep) -> tuple[Arm, ...]:
    """Three delta rules, with a decay of every channel, of every head and none; and a decay without the delta rule."""
    return (
        arm(KDA, sweep, mixer("kimi_delta_attention", sweep)),
        arm(GATED, sweep, mixer("gated_delta_net", sweep, expand_v=1.0)),
        arm(DELTA, sweep, mixer("delta_net", sweep, use_output_gate=True)),
        arm(MAMBA, sweep, mamba2(sweep, 1.0)),
    )


def cells(sweep: KimiSweep) -> tuple[Cell, ...]:
    """Every task at every length."""

    def cell(name: str, length: int) -> Cell:
        third = length // 3
        makers: dict[str, Callable[[], Task]] = {
            PALINDROME: lambda: Palindrome(length=length, vocab_size=sweep.palindrome_tokens),
            RECALL: lambda: MultiQueryRecall(pairs=third, queries=third, vocab_size=sweep.recall_tokens),
            STACK: lambda: Stacks(operations=third, stacks=sweep.stacks, elements=sweep.elements),
        }
        if name not in makers:
            raise ValueError(f"tasks must be among {', '.join(makers)}, got {name!r}")
        task = makers[name]()
        return Cell(name=name_of(name, length), task=task, tests={name_of(name, length): task})

    return tuple(cell(name, length) for name in sweep.tasks for length in sweep.lengths)


def order(task: str) -> Callable[[Results], Verdict]:
    """Whether a decay of every channel is at least as good as one of every head, and both better than no delta rule."""

    def judge(results: Results) -> Verdict:
        cell = longest(results, task)
        kda, gated, delta, mamba = (results.best(cell, name, cell, "token") for name in (KDA, GATED, DELTA, MAMBA))
        words = f"{kda} / {gated} / {mamba}; DeltaNet {delta}"
        return Verdict(words, kda.mean > gated.mean - 0.01 and gated.low > mamba.high + 0.05)

    return judge


def stacks(results: Results) -> Verdict:
    """Every seed of both; Mamba-2 is reported."""
    cell = longest(results, STACK)
    kda, gated, mamba = (results.best(cell, name, cell, "token") for name in (KDA, GATED, MAMBA))
    return Verdict(f"{kda} / {gated}; Mamba-2 {mamba}", min(kda.low, gated.low) > 0.95)


def longest(results: Results, task: str) -> str:
    """The last of a task's cells.

    Raises:
        KeyError: there is none.
    """
    found = [cell for cell in results.cells if cell.startswith(task)]
    if not found:
        raise KeyError(task)
    return found[-1]


CPU = KimiSweep(
    learning_rates=(3e-3, 6e-3),
    steps=600,
    batch_size=32,
    test_examples=512,
    evaluate_every=100,
    hidden_size=32,
    num_heads=2,
    head_dim=16,
    num_layers=2,
    intermediate_size=0,
    tasks=(PALINDROME, STACK),
    lengths=(36,),
    palindrome_tokens=64,
    stacks=4,
    elements=16,
)
PAPER = KimiSweep(
    learning_rates=(5e-5, 1e-4, 5e-4, 1e-3),
    weight_decays=(0.1,),
    steps=20_000,
    batch_size=64,
    test_examples=1000,
    evaluate_every=500,
    hidden_size=256,
    num_heads=2,
    head_dim=128,
    num_layers=2,
)

STUDY = Study(
    name="kimi_synthetic",
    title="Palindromes, recall and stacks",
    source="Kimi team, Kimi Linear (2025), section 5.1 and figure 4",
    text="A list backwards; values of all keys, one question after the other; what comes off one of many stacks. The "
    "report trains two layers with two heads of 128 for at most 20,000 steps at each length, takes the best of four "
    "learning rates, and shows the highest training accuracy; vocabularies, numbers of pairs, batch size, width and "
    "optimizer are not stated and are choices of ours (width 256, batch 64, AdamW). Ours are accuracies on test sequences "
    "at the end. The scale cpu is palindromes of 36 tokens out of 63 and four stacks of 16 elements with 12 operations, "
    "two layers without MLP with two heads of 16, 600 steps. The state of Mamba-2 is four heads of 16 x 16 there, twice "
    "that of the others. The scale gpu is length 256 with 4000 steps and two of the four learning rates.",
    metric="token",
    show=("token",),
    scales={
        "cpu": CPU,
        "gpu": PAPER.but(learning_rates=(5e-4, 1e-3), steps=4000, lengths=(256,)),
        "paper": PAPER,
    },
    arms=arms,
    cells=cells,
    claims=(
        Claim(
            text="Palindrome: KDA at least as good as Gated DeltaNet, Mamba-2 clearly behind",
            paper="KDA 100, Gated DeltaNet 97, Mamba-2 0 (length 1024, figure)",
            judge=order(PALINDROME),
        ),
        Claim(
            text="Recall: KDA at least as good as Gated DeltaNet, Mamba-2 clearly behind",
            paper="KDA 100, Gated DeltaNet 79, Mamba-2 0 (length 1024, figure)",
            judge=order(RECALL),
        ),
        Claim(
            text="Stacks: KDA and Gated DeltaNet solve them (over 95 % on every seed)",
            paper="100 and 100 at every length; Mamba-2 100 at 256 and 512, 0 beyond (figure)",
            judge=stacks,
        ),
    ),
    published={
        (name_of(task, length), name): f"{number} (figure)"
        for task, rows in {
            PALINDROME: {KDA: (100, 100, 100, 42), GATED: (100, 100, 97, 37), MAMBA: (100, 0, 0, 0)},
            RECALL: {KDA: (100, 100, 100, 48), GATED: (100, 100, 79, 29), MAMBA: (98, 0, 0, 0)},
            STACK: {KDA: (100, 100, 100, 100), GATED: (100, 100, 100, 100), MAMBA: (100, 100, 0, 0)},
        }.items()
        for name, numbers in rows.items()
        for length, number in zip((256, 512, 1024, 2048), numbers, strict=True)
    },
    plot="steps",
)

if __name__ == "__main__":
    main(STUDY)
