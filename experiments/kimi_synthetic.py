"""Palindrome, recall and stacks (Kimi Linear, figure 4): `python -m experiments.kimi_synthetic [--scale ...] [--list]`."""

from dataclasses import dataclass

from delta_jax.data.tasks import MultiQueryRecall, Palindrome, Stacks, Task
from experiments.harness import Arm, Cell, Claim, Results, Study, Sweep, Verdict, arm, main, mixer

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
    mamba = mixer("mamba_2", sweep.but(num_heads=1), expand_v=1.0)
    return (
        arm(KDA, sweep, mixer("kimi_delta_attention", sweep)),
        arm(GATED, sweep, mixer("gated_delta_net", sweep, expand_v=1.0)),
        arm(DELTA, sweep, mixer("delta_net", sweep, use_output_gate=True)),
        arm(MAMBA, sweep, mamba),
    )


def cells(sweep: KimiSweep) -> tuple[Cell, ...]:
    """Every task at every length."""

    def cell(name: str, length: int) -> Cell:
        third = length // 3
        makers = {
            PALINDROME: lambda: Palindrome(length=length, vocab_size=sweep.palindrome_tokens),
            RECALL: lambda: MultiQueryRecall(pairs=third, queries=third, vocab_size=sweep.recall_tokens),
            STACK: lambda: Stacks(operations=third, stacks=sweep.stacks, elements=sweep.elements),
        }
        if name not in makers:
            raise ValueError(f"tasks must be among {', '.join(makers)}, got {name!r}")
        task: Task = makers[name]()
        return Cell(name=name_of(name, length), task=task, tests={name_of(name, length): task})

    return tuple(cell(name, length) for name in sweep.tasks for length in sweep.lengths)


CPU = KimiSweep(
    learning_rates=(3e-3, 1e-2),
    steps=800,
    batch_size=32,
    test_examples=256,
    evaluate_every=100,
    hidden_size=32,
    num_heads=2,
    head_dim=16,
    num_layers=2,
    mlp_size=0,
    tasks=(PALINDROME, STACK),
    lengths=(36,),
    palindrome_tokens=64,
    stacks=4,
    elements=16,
)
STUDY = Study(
    name="kimi_synthetic",
    title="x",
    source="x",
    text="x",
    metric="token",
    show=("token",),
    scales={"cpu": CPU},
    arms=arms,
    cells=cells,
    claims=(),
)
if __name__ == "__main__":
    main(STUDY)
