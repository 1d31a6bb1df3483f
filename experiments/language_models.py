"""Language models of equal size on equal tokens: `python -m experiments.language_models [--scale ...] [--list]`."""

from collections.abc import Callable
from dataclasses import dataclass

from flax import nnx

from delta_jax.data import DataConfig
from delta_jax.data.tasks import Corpus
from delta_jax.models import LanguageModel, ModelConfig, number_of_parameters
from delta_jax.models.config import MixerSpec
from delta_jax.training import OptimizerConfig
from experiments.harness import Arm, Cell, Claim, Results, Study, Sweep, Verdict, arm, main, mixer
from experiments.harness.comparisons import better, gla, mamba2

CELL = "held-out documents"
DELTA, GATED, PRODUCT, KDA, GATED_2 = "DeltaNet", "Gated DeltaNet", "DeltaProduct, n_h = 2", "KDA", "Gated DeltaNet-2"
KLA, GLA, MAMBA, TRANSFORMER = "KLA", "GLA", "Mamba-2", "Transformer++"
WINDOWED, KIMI = "Gated DeltaNet + window attention", "KDA + attention"


@dataclass(frozen=True, kw_only=True)
class LanguageSweep(Sweep):
    """A sweep with a corpus.

    Attributes:
        corpus: "stdlib" or a path, see `DataConfig`.
        length: tokens of a sequence, T.
        window: tokens that sliding window attention sees.
    """

    corpus: str = "stdlib"
    length: int = 128
    window: int = 32


def arms(sweep: LanguageSweep) -> tuple[Arm, ...]:
    """The family, what it is compared with, and hybrids; the SwiGLU layers make up for what the mixers differ in."""
    gated = mixer("gated_delta_net", sweep, expand_v=1.0)
    kimi = mixer("kimi_delta_attention", sweep)
    attention = mixer("attention", sweep)
    patterns: dict[str, tuple[MixerSpec, ...]] = {
        DELTA: (mixer("delta_net", sweep),),
        GATED: (gated,),
        KDA: (kimi,),
        GATED_2: (mixer("gated_delta_net_2", sweep),),
        PRODUCT: (mixer("delta_product", sweep, num_householder=2, expand_v=1.0),),
        KLA: (mixer("kaczmarz_linear_attention", sweep, expand_v=1.0),),
        GLA: (gla(sweep, expand_v=1.0),),
        MAMBA: (mamba2(sweep, expand_v=1.0),),
        TRANSFORMER: (attention,),
        WINDOWED: (gated, mixer("attention", sweep, window=sweep.window)),
        KIMI: (*[kimi] * min(3, sweep.num_layers - 1), mixer("attention", sweep, rope_fraction=0.0)),
    }
    wanted = _size(_model((attention,), sweep, sweep.intermediate_size))
    return tuple(
        arm(name, sweep, *pattern, intermediate_size=_fitting(pattern, sweep, wanted))
        for name, pattern in patterns.items()
    )


def _fitting(pattern: tuple[MixerSpec, ...], sweep: LanguageSweep, wanted: int) -> int:
    """The width of the SwiGLU layers with which a model comes closest to a number of parameters."""
    one, two = (_size(_model(pattern, sweep, width)) for width in (1, 2))
    return max(round((wanted - one) / (two - one)) + 1, 1)


def _model(pattern: tuple[MixerSpec, ...], sweep: LanguageSweep, intermediate_size: int | None) -> ModelConfig:
    return ModelConfig(
        vocab_size=Corpus().vocab_size,
        hidden_size=sweep.hidden_size,
        num_layers=sweep.num_layers,
        pattern=pattern,
        intermediate_size=intermediate_size,
    )


def _size(config: ModelConfig) -> int:
    return number_of_parameters(nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0))))


def cells(sweep: LanguageSweep) -> tuple[Cell, ...]:
    """One corpus; held out are a twentieth of its documents."""
    task = Corpus(data=DataConfig(path=sweep.corpus), length=sweep.length)
    return (Cell(name=CELL, task=task, tests={CELL: task}),)


def fewer_bits(first: str, second: str) -> Callable[[Results], Verdict]:
    """Whether one predicts better than another."""
    return better(CELL, first, second, metric="bits", words="bits per byte: ")


def level(results: Results) -> Verdict:
    """Whether DeltaNet and Transformer++ are within a hundredth of each other."""
    one, other = (results.best(CELL, name, CELL, "bits") for name in (DELTA, TRANSFORMER))
    return Verdict(f"bits per byte: {one} against {other}", abs(one.mean / other.mean - 1) < 0.01)


CPU = LanguageSweep(
    learning_rates=(2e-3, 5e-3),
    weight_decays=(0.1,),
    steps=300,
    batch_size=8,
    test_examples=256,
    evaluate_every=100,
    hidden_size=64,
    num_heads=2,
    num_layers=2,
    intermediate_size=192,
    optimizer=OptimizerConfig(warmup_steps=20),
)
GPU = CPU.but(
    learning_rates=(1e-3, 3e-3),
    seeds=(0,),
    steps=1000,
    batch_size=32,
    length=512,
    window=128,
    evaluate_every=250,
    hidden_size=384,
    num_heads=3,
    num_layers=8,
    intermediate_size=1024,
    dtype="bfloat16",
    optimizer=OptimizerConfig(warmup_steps=100),
)

STUDY = Study(
    name="language_models",
    title="Language models",
    source="Yang et al., DeltaNet (arXiv 2406.06484), table 1, and Gated DeltaNet (arXiv 2412.06464), table 3; Kimi Linear, "
    "Gated DeltaNet-2, DeltaProduct and KLA have tables of the kind",
    text="The next byte of the source of Python's standard library, in windows of documents that training never saw; bits "
    "per byte, the fewer the better. All models have the same number of parameters (the width of their SwiGLU layers makes "
    "up for the mixers), see the same windows in the same order, and have the same state where there is one: heads x head "
    "size squared in every layer. The papers train 340 million and 1.3 billion parameters on 15 and 100 billion tokens of "
    "web text; a few hundred thousand bytes on two cores say what is learnt first, not what is learnt in the end, and "
    "nothing about contexts longer than a window. GLA has the convolution that the family has; attention has rotary "
    "positions and no convolution, but in KDA's hybrid, where it has neither; that one has three layers of KDA for each of "
    "attention, where there are as many.",
    metric="bits",
    show=("bits",),
    scales={
        "cpu": CPU,
        "gpu": GPU,
        "paper": GPU.but(
            learning_rates=(3e-4, 1e-3),
            weight_decays=(0.01,),
            seeds=(0, 1, 2),
            steps=28_600,
            batch_size=256,
            length=2048,
            window=1024,
            test_examples=4096,
            evaluate_every=1000,
            hidden_size=1024,
            num_heads=8,
            num_layers=24,
            intermediate_size=None,
            optimizer=OptimizerConfig(warmup_steps=1000, initial_ratio=0.1),
        ),
    },
    arms=arms,
    cells=cells,
    claims=(
        Claim(
            text="Language models: Gated DeltaNet predicts better than DeltaNet",
            paper="Wikitext perplexity 16.42 against 17.71 (1.3B)",
            judge=fewer_bits(GATED, DELTA),
        ),
        Claim(
            text="Language models: DeltaNet predicts better than GLA",
            paper="16.87 against 17.22 (1.3B, the DeltaNet paper)",
            judge=fewer_bits(DELTA, GLA),
        ),
        Claim(
            text="Language models: Gated DeltaNet predicts better than Mamba-2",
            paper="16.42 against 16.56 (1.3B)",
            judge=fewer_bits(GATED, MAMBA),
        ),
        Claim(
            text="Language models: Gated DeltaNet predicts better than Transformer++",
            paper="16.42 against 18.53 (1.3B)",
            judge=fewer_bits(GATED, TRANSFORMER),
        ),
        Claim(
            text="Language models: DeltaNet is on a par with Transformer++ (within 1 %)",
            paper="16.87 against 16.85 (1.3B, the DeltaNet paper)",
            judge=level,
        ),
        Claim(
            text="Language models: layers of sliding window attention help",
            paper="DeltaNet 16.87, with them 16.56 (1.3B)",
            judge=fewer_bits(WINDOWED, GATED),
        ),
    ),
    published={
        (CELL, GATED): "16.42 (Wikitext perplexity, 1.3B)",
        (CELL, DELTA): "17.71; 16.87 in its own paper",
        (CELL, MAMBA): "16.56",
        (CELL, GLA): "17.22 (the DeltaNet paper)",
        (CELL, TRANSFORMER): "18.53; 16.85 in the DeltaNet paper",
    },
    answer="byte",
    plot="steps",
)

if __name__ == "__main__":
    main(STUDY)
