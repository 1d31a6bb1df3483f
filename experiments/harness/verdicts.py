"""What a study claims, after its paper, and what our results say to it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from experiments.harness.layout import TRAINED
from experiments.harness.results import Results
from experiments.harness.study import METRICS, Arm, Cell, Group, Sweep, make_groups

__all__ = ["Claim", "Study", "Verdict"]


class Verdict(NamedTuple):
    """What the results say.

    Attributes:
        ours: our numbers, in a few words.
        holds: None where they cannot tell.
    """

    ours: str
    holds: bool | None

    @property
    def word(self) -> str:
        """As the page has it."""
        return {True: "holds", False: "**does not hold**", None: "cannot tell"}[self.holds]


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A statement of a paper that results can hold or not.

    Attributes:
        text: the statement.
        paper: the paper's number.
        judge: reads our results; a KeyError in it (a part that was not run) means "cannot tell".
    """

    text: str
    paper: str
    judge: Callable[[Results], Verdict]


@dataclass(frozen=True, kw_only=True)
class Study[S: Sweep]:
    """One table or figure of a paper.

    Attributes:
        name: of its module in `experiments`.
        title: what it shows.
        source: paper and table or figure.
        text: the protocol in a few sentences, and what was cut at our scales.
        metric: what selects learning rates, one of `METRICS`.
        show: the metrics that the table has.
        scales: how large it is, by name.
        arms, cells: architectures and problems of a sweep.
        claims: what is held against the results.
        published: the paper's number for a cell and an arm.
        answer: what is asked for, one at a time, as the axes of figures call it.
        plot: "positions" draws accuracy over the position in the longest test set, "steps" the metric over training.
    """

    name: str
    title: str
    source: str
    text: str
    metric: str
    show: tuple[str, ...]
    scales: Mapping[str, S]
    arms: Callable[[S], tuple[Arm, ...]]
    cells: Callable[[S], tuple[Cell, ...]]
    claims: tuple[Claim, ...]
    published: Mapping[tuple[str, str], str] = field(default_factory=dict)
    answer: str = "answer"
    plot: str | None = None

    def __post_init__(self) -> None:
        for metric in (self.metric, *self.show):
            if metric not in METRICS:
                raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}")

    def groups(self, scale: str, sweep: S) -> list[Group]:
        """All that a sweep trains, in order."""
        return make_groups(self.name, scale, self.metric, self.arms(sweep), self.cells(sweep), sweep)

    def layout(self, scale: str) -> dict[str, Any]:
        """What files of its results hold, see `misfit`."""
        return TRAINED | {"study": self.name, "scale": scale}
