"""Associative recall, keys overwritten or not (Zoology; DeltaNet figure 4): `python -m experiments.mqar [--scale ...]`."""

from dataclasses import dataclass

from delta_jax.data.tasks import MQAR
from delta_jax.models.config import MixerSpec
from experiments.harness import Arm, Cell, Claim, Results, Study, Sweep, Verdict, arm, main, mixer

PLAIN, FORGETTING = "plain", "keys overwritten"
DELTA, GATED, LINEAR, GLA, RETNET = "DeltaNet", "Gated DeltaNet", "linear attention, normalised", "GLA", "RetNet"
BOTH, BASELINES = (DELTA, GATED, LINEAR), (GLA, RETNET)


@dataclass(frozen=True, kw_only=True)
class RecallSweep(Sweep):
    """A sweep with the sizes of the recall task.

    Attributes:
        vocab_size, length, pairs: of the task, see `MQAR`.
        overwritten: pairs of the second cell, every key of which gets another value; 0 leaves that cell out.
        widths: hidden sizes, in each of which every architecture is trained; none is `hidden_size` alone.
        baselines: whether GLA and RetNet, without short convolutions, are among the architectures.
        use_short_conv: in all others.
    """

    vocab_size: int = 8192
    length: int = 512
    pairs: int = 64
    overwritten: int = 0
    widths: tuple[int, ...] = ()
    baselines: bool = False
    use_short_conv: bool = False


def name_of(architecture: str, width: int) -> str:
    """In tables, where the sweep has widths."""
    return f"{architecture}, {width}"


def arms(sweep: RecallSweep) -> tuple[Arm, ...]:
    """The delta rule, the same with a decay, and the same without the erasing: all without an output gate."""

    def spec(name: str, sweep: RecallSweep) -> MixerSpec:
        mixers = {DELTA: "delta_net", GATED: "gated_delta_net", LINEAR: "linear_attention"}
        if name in mixers:
            own = {"feature_map": "l2"} if name == LINEAR else {}
            conv = sweep.use_short_conv
            return mixer(mixers[name], sweep, expand_v=1.0, use_output_gate=False, use_short_conv=conv, **own)
        return mixer({GLA: "gated_linear_attention", RETNET: "retnet"}[name], sweep, use_short_conv=False)

    names = BOTH + (BASELINES if sweep.baselines else ())
    if not sweep.widths:
        return tuple(arm(name, sweep, spec(name, sweep)) for name in names)
    sizes = [sweep.but(hidden_size=width) for width in sweep.widths]
    return tuple(arm(name_of(name, size.hidden_size), size, spec(name, size)) for size in sizes for name in names)


def cells(sweep: RecallSweep) -> tuple[Cell, ...]:
    """Every key with one value; fewer keys with two values each, the second of which is asked for."""

    def cell(name: str, pairs: int, updates: int) -> Cell:
        task = MQAR(
            vocab_size=sweep.vocab_size,
            length=sweep.length,
            pairs=pairs,
            updates=updates,
            random_non_queries=False,
        )
        return Cell(name=name, task=task, tests={name: task})

    plain = cell(PLAIN, sweep.pairs, 0)
    return (cell(FORGETTING, sweep.overwritten, sweep.overwritten), plain) if sweep.overwritten else (plain,)


def overwriting(results: Results) -> Verdict:
    """The worst seed of the delta rule against the best one without erasing, each at its best learning rate."""
    delta, gated, linear = (results.best(FORGETTING, name, FORGETTING, "token") for name in BOTH)
    words = f"{delta} and, with a decay, {gated} against {linear}"
    return Verdict(words, min(delta.low, gated.low) > linear.high + 0.2)


def interference(results: Results) -> Verdict:
    """The same where no key is overwritten."""
    delta, linear = (results.best(PLAIN, name, PLAIN, "token") for name in (DELTA, LINEAR))
    return Verdict(f"{delta} against {linear}", delta.low > linear.high)


def hardest(results: Results) -> Verdict:
    """At width 64, as in the paper's figure."""
    delta, gla = (results.best(PLAIN, name_of(name, 64), PLAIN, "token") for name in (DELTA, GLA))
    return Verdict(f"{delta} against GLA's {gla}", delta.high > 0.99 and gla.high < 0.5)


CPU = RecallSweep(
    learning_rates=(3e-3, 1e-2),
    steps=800,
    batch_size=64,
    test_examples=512,
    evaluate_every=100,
    hidden_size=32,
    num_heads=1,
    head_dim=16,
    intermediate_size=0,
    vocab_size=64,
    length=64,
    pairs=16,
    overwritten=8,
    use_short_conv=True,
)
PAPER = RecallSweep(
    learning_rates=(1e-4, 4.64e-4, 2.15e-3, 1e-2),
    weight_decays=(0.1,),
    seeds=(123,),
    steps=64 * 781,
    batch_size=128,
    train_examples=100_000,
    test_examples=3000,
    evaluate_every=781,
    stop_at=0.99,
    num_heads=2,
    num_layers=2,
    intermediate_size=0,
    widths=(64, 128, 256, 512),
    baselines=True,
)

STUDY = Study(
    name="mqar",
    title="Multi-query associative recall",
    source="Arora et al., Zoology (arXiv 2312.04927), figure 2 and code; Yang et al., Parallelizing linear transformers "
    "with the delta rule (arXiv 2406.06484), figure 4",
    text="Keys with their values, then the keys again in random order: what was the value? The paper's figure is at 512 "
    "tokens, 64 pairs and 8192 words, two layers without MLP or convolution, 100,000 training sequences for at most 64 "
    "epochs, the best of four learning rates. There the head is tied, norms are LayerNorms and embeddings have a dropout "
    "of 0.1; here the head is not, norms are RMSNorms and nothing is dropped. The scale cpu is one layer with one head of "
    "16 channels and short convolutions, 64 tokens, 64 words (31 keys, 32 values), new sequences at every step: 16 pairs, "
    "or 8 pairs every key of which gets a second value, the one asked for (Zoology's forgetting variant, of which no "
    "numbers were published). The linear attention has the same SiLU, unit lengths, convolution and norm as DeltaNet and "
    "lacks only the erasing. The scale gpu is the paper's task at width 64, with two of the four learning rates, three "
    "seeds and 5 epochs.",
    metric="token",
    show=("token",),
    scales={
        "cpu": CPU,
        "gpu": PAPER.but(
            learning_rates=(2.15e-3, 1e-2),
            seeds=(0, 1, 2),
            steps=5 * 781,
            test_examples=1000,
            evaluate_every=300,
            widths=(64,),
        ),
        "paper": PAPER,
    },
    arms=arms,
    cells=cells,
    claims=(
        Claim(
            text="Where keys are overwritten, the delta rule beats linear attention that is normalised alike by more than "
            "20 points",
            paper="no number published",
            judge=overwriting,
        ),
        Claim(
            text="Where keys are not overwritten, the delta rule is ahead of linear attention that is normalised alike, "
            "on every seed",
            paper="no number published",
            judge=interference,
        ),
        Claim(
            text="With 64 pairs in 512 tokens DeltaNet of width 64 is perfect without a convolution; GLA recalls a quarter",
            paper="100 % / 22 % (figure)",
            judge=hardest,
        ),
    ),
    published={
        (PLAIN, name_of(name, width)): f"{number} % (figure)"
        for name, numbers in {DELTA: (100, 100, 100, 100), GLA: (22, 95, 100, 100), RETNET: (5, 87, 96, 97)}.items()
        for width, number in zip((64, 128, 256, 512), numbers, strict=True)
    },
    answer="value",
    plot="steps",
)

if __name__ == "__main__":
    main(STUDY)
