"""Needles in a haystack, byte by byte, trained (Gated DeltaNet's table): `python -m experiments.needles [--scale ...]`."""

from dataclasses import dataclass
from pydoc_data.topics import topics
from typing import Any

from delta_jax.data.tasks import Needles
from experiments.harness import Arm, Cell, Claim, Results, Study, Summary, Sweep, Verdict, arm, main, mixer
from experiments.harness.comparisons import mamba2

GATED, DELTA, MAMBA = "Gated DeltaNet", "DeltaNet", "Mamba-2"
DISTRACTORS, PASSKEY, NUMBER, UUID = "distractors", "S-NIAH-1", "S-NIAH-2, other text", "S-NIAH-3, other text"
LEARNT = 0.3
"""Share of digits right from which on something has been learnt; guessing gives 0.1."""

SENTENCES = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "


@dataclass(frozen=True, kw_only=True)
class NeedleSweep(Sweep):
    """A sweep with the sizes of the haystacks.

    Attributes:
        kinds: which problems.
        haystack_bytes: text around the needles in training.
        stretches: haystacks of the tests, as multiples of it.
        needles: of the problem with distractors, the one asked for among them.
        digits: of a number.
        terse: needles `name: number.` and the question `name:`, in place of RULER's wording.
    """

    kinds: tuple[str, ...] = (PASSKEY, NUMBER, UUID, DISTRACTORS)
    haystack_bytes: int = 1024
    stretches: tuple[int, ...] = (1, 2, 4)
    needles: int = 4
    digits: int = 7
    terse: bool = False


def arms(sweep: NeedleSweep) -> tuple[Arm, ...]:
    """The delta rule with a decay and without; where there is time, the decay without the delta rule too."""
    found = (
        arm(GATED, sweep, mixer("gated_delta_net", sweep, expand_v=1.0)),
        arm(DELTA, sweep, mixer("delta_net", sweep, use_output_gate=True)),
    )
    if sweep.terse:
        return found
    return *found, arm(MAMBA, sweep, mamba2(sweep, 1.0))


def cells(sweep: NeedleSweep) -> tuple[Cell, ...]:
    """Every problem, tested in haystacks as long as in training and longer."""
    text = (SENTENCES * 100,) if sweep.terse else tuple(topics.values())
    wording: dict[str, Any] = {"opening": "", "needle": "{key}: {value}.", "question": "{key}:"} if sweep.terse else {}
    kinds: dict[str, dict[str, Any]] = {
        PASSKEY: {"haystack": "noise"},
        NUMBER: {"haystack": "text", "documents": text},
        UUID: {"haystack": "text", "documents": text, "uuids": True},
        DISTRACTORS: {"haystack": "text", "documents": text, "needles": sweep.needles},
    }

    def cell(name: str) -> Cell:
        if name not in kinds:
            raise ValueError(f"kinds must be among {', '.join(kinds)}, got {name!r}")
        sizes = [factor * sweep.haystack_bytes for factor in sweep.stretches]
        problems = [Needles(haystack_bytes=size, digits=sweep.digits, **kinds[name], **wording) for size in sizes]
        tests = {f"{size} bytes": problem for size, problem in zip(sizes, problems, strict=True)}
        return Cell(name=name, task=problems[0], tests=tests)

    return tuple(cell(name) for name in sweep.kinds)


def chosen(results: Results, cell: str, test: int) -> list[Summary]:
    """Share of digits right, of Gated DeltaNet and DeltaNet."""
    name = results.tests(cell)[test]
    return [results.best(cell, architecture, name, "token") for architecture in (GATED, DELTA)]


def decay_helps(results: Results) -> Verdict:
    """As trained and in the longest haystack; where neither has left guessing, nothing is said."""
    (gated, delta), (far, other) = chosen(results, DISTRACTORS, 0), chosen(results, DISTRACTORS, -1)
    words = f"digits: {gated} against {delta}; in the longest haystack {far} against {other}"
    ahead = min(gated.mean - delta.mean, far.mean - other.mean) > 0.02
    return Verdict(words, ahead if max(gated.high, delta.high) > LEARNT else None)


def passkey(results: Results) -> Verdict:
    """Nothing but noise, up to the longest haystack."""
    far, other = chosen(results, PASSKEY, -1)
    return Verdict(f"digits: {other} against {far}", other.mean >= far.mean if other.high > LEARNT else None)


CPU = NeedleSweep(
    learning_rates=(5e-3, 8e-3),
    steps=1500,
    batch_size=32,
    test_examples=256,
    evaluate_every=200,
    hidden_size=32,
    num_heads=2,
    head_dim=16,
    num_layers=2,
    intermediate_size=0,
    initializer_std=0.1,
    kinds=(DISTRACTORS,),
    haystack_bytes=32,
    needles=3,
    digits=6,
    terse=True,
)
GPU = NeedleSweep(
    learning_rates=(5e-4, 1e-3),
    weight_decays=(0.1,),
    steps=2500,
    batch_size=32,
    test_examples=500,
    evaluate_every=250,
    hidden_size=256,
    num_heads=4,
    head_dim=64,
    num_layers=2,
    stretches=(1, 2, 4),
)

STUDY = Study(
    name="needles",
    title="Needles in a haystack, trained",
    source="Hsieh et al., RULER (arXiv 2404.06654), and Yang, Kautz and Hatamizadeh, Gated delta networks (arXiv "
    "2412.06464), table of S-NIAH",
    text="A number hidden in a text under a name, asked for at the end; a sequence is right if every digit is the "
    "likeliest byte after the right ones before it. The paper asks language models of 1.3 billion parameters, trained on "
    "100 billion tokens of text, without training them for it, in 1000 to 8000 tokens of words; here small models are "
    "trained on nothing else, byte by byte, so the numbers say what a layer can learn and not what pretraining gives. The "
    "scale cpu is three needles `name: number.` with numbers of 6 digits in 32 bytes of RULER's sentences of noise, one "
    "of them asked for, tested also in 64 and 128 bytes; two layers of width 32 with two heads of 16 and without MLP, "
    "initial matrices of standard deviation 0.1, 1500 steps. The scale gpu has RULER's wording and noise, numbers of 7 "
    "digits, UUIDs, and Python's language reference in place of essays; trained in 1024 bytes, 2500 steps, tested to "
    "4096; the scale paper is trained in 4096 bytes and tested to 32,768, 20,000 steps.",
    metric="token",
    show=("token", "sequence"),
    scales={
        "cpu": CPU,
        "gpu": GPU,
        "paper": GPU.but(
            learning_rates=(1e-4, 5e-4, 1e-3),
            steps=20_000,
            evaluate_every=1000,
            num_layers=4,
            haystack_bytes=4096,
            stretches=(1, 2, 4, 8),
        ),
    },
    arms=arms,
    cells=cells,
    claims=(
        Claim(
            text="Among distractors Gated DeltaNet gets more digits right than DeltaNet, as trained and in longer haystacks",
            paper="S-NIAH-2 at 1K/2K/4K/8K: 100/99.8/92.2/29.6 against 98.4/45.6/18.6/14.4 (zero-shot, 1.3B)",
            judge=decay_helps,
        ),
        Claim(
            text="In noise alone (S-NIAH-1) DeltaNet keeps the needle at least as long as Gated DeltaNet",
            paper="97.4/96.8/99.0/98.8 against 98.4/88.4/91.4/91.8 (zero-shot, 1.3B)",
            judge=passkey,
        ),
    ),
    published={
        (cell, name): f"{numbers} (zero-shot, 1.3B)"
        for cell, rows in {
            PASSKEY: {GATED: "98.4/88.4/91.4/91.8", DELTA: "97.4/96.8/99.0/98.8", MAMBA: "99.2/98.8/65.4/30.4"},
            NUMBER: {GATED: "100/99.8/92.2/29.6", DELTA: "98.4/45.6/18.6/14.4", MAMBA: "99.4/98.8/56.2/17.0"},
            UUID: {GATED: "86.6/84.2/27.6", DELTA: "85.2/47.0/22.4", MAMBA: "64.4/47.6/4.6"},
        }.items()
        for name, numbers in rows.items()
    },
    answer="digit",
    plot="steps",
)

if __name__ == "__main__":
    main(STUDY)
