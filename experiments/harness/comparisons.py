"""What several comparisons share: architectures at the sizes of the others, and who is better by more than its seeds."""

from collections.abc import Callable

from delta_jax.models.config import MixerSpec
from experiments.harness.results import Results
from experiments.harness.study import LOWER_IS_BETTER, Sweep, mixer
from experiments.harness.verdicts import Verdict

__all__ = ["better", "gla", "mamba2"]


def gla(sweep: Sweep, expand_v: float, *, use_short_conv: bool = True) -> MixerSpec:
    """Gated linear attention, with a convolution like the family's unless told otherwise."""
    return mixer("gated_linear_attention", sweep, expand_v=expand_v, use_short_conv=use_short_conv)


def mamba2(sweep: Sweep, expand_v: float) -> MixerSpec:
    """Mamba-2 with as many heads and as large a state as the others; one key serves all heads."""
    size = sweep.head_dim or sweep.hidden_size // sweep.num_heads
    return mixer("mamba2", sweep, num_heads=1, head_dim=size, num_v_heads=sweep.num_heads, expand_v=expand_v)


def better(
    cell: str, first: str, second: str, *, test: int = 0, metric: str = "token", words: str = ""
) -> Callable[[Results], Verdict]:
    """Whether every seed of one architecture is better than every seed of another; no verdict where they overlap."""

    def judge(results: Results) -> Verdict:
        name = results.tests(cell)[test]
        one, other = (results.best(cell, arm, name, metric) for arm in (first, second))
        apart = one.low > other.high or other.low > one.high
        return Verdict(
            f"{words}{one} against {other}", (one.mean > other.mean) != (metric in LOWER_IS_BETTER) if apart else None
        )

    return judge
