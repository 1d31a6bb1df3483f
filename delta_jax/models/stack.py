"""A stack of layers, cut into runs that each repeat a block: what repeats is compiled once and run by a scan."""

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

__all__ = ["Run", "cut_into_runs"]


class Run(NamedTuple):
    """Consecutive layers of a stack.

    Attributes:
        block: layers that repeat together.
        repeats: how often.
    """

    block: tuple[Any, ...]
    repeats: int


def cut_into_runs(layers: Sequence[Hashable], period: int) -> tuple[Run, ...]:
    """Cuts greedily: each run is the longest repetition, of a block of at most `period` layers, that begins there.

    Args:
        layers: the whole stack, in order.
        period: the longest block, the length of the pattern.

    Returns:
        runs whose blocks, repeated and joined, are the stack. Layers that repeat nothing share runs of one repeat.
    """
    runs: list[Run] = []
    start = 0
    while start < len(layers):
        options = [
            Run(tuple(layers[start : start + size]), _repeats(layers, start, size)) for size in range(1, period + 1)
        ]
        best = max(options, key=lambda run: (len(run.block) * run.repeats if run.repeats > 1 else 0, -len(run.block)))
        start += len(best.block) * best.repeats
        if best.repeats == 1 and runs and runs[-1].repeats == 1:
            best = Run(runs.pop().block + best.block, 1)
        runs.append(best)
    return tuple(runs)


def _repeats(layers: Sequence[Hashable], start: int, size: int) -> int:
    """How often the `size` layers from a start on stand there one after the other."""
    repeats = 1
    while all(
        index + size < len(layers) and layers[index] == layers[index + size]
        for index in range(start + (repeats - 1) * size, start + repeats * size)
    ):
        repeats += 1
    return repeats
