"""Pictures: one pair of axes with its legend below, and on it the loss curve of a run."""

import io
import itertools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

WIDTH, HEIGHT = 7.0, 4.2
"""Inches; of the height, the legend is on top."""

MARGIN = 0.15
"""Inches around the legend."""


@contextmanager
def picture(path: Path, *, title: str = "", note: str = "", dpi: int = 150) -> Iterator[Axes]:
    """Axes to draw on, over whole numbers; the picture is written at the end, or not at all where drawing fails.

    All labelled curves stand in a legend below the axes, which covers nothing. The settings are matplotlib's own, whatever
    the user has configured, and the file holds neither date nor version: the same curves make the same bytes.

    Args:
        path: the PNG to write.
        title: above the axes.
        note: above the legend.
        dpi: dots per inch.
    """
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.set_title(title, fontsize=10, parse_math=False)
        axes.grid(alpha=0.25)
        axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 2.5, 5, 10], integer=True))
        yield axes
        _legend(figure, axes, note)
        drawn = io.BytesIO()
        figure.savefig(drawn, format="png", dpi=dpi, metadata={"Software": None})
    draft = path.with_name(f"{path.name}.{os.getpid()}.draft")
    draft.write_bytes(drawn.getvalue())
    draft.replace(path)


def plot_curve(
    path: Path,
    training: Sequence[Mapping[str, Any]],
    validation: Sequence[Mapping[str, Any]],
    baselines: Mapping[str, float] | None = None,
) -> Axes:
    """Draw bits per byte over steps, training and validation, and horizontal baselines, into a PNG.

    Args:
        path: the file to write.
        training: entries with "step" and "bits_per_byte".
        validation: the same, of the evaluations.
        baselines: label -> bits per byte.

    Returns:
        What was drawn.
    """
    with picture(path) as axes:
        steps, values = _series(training)
        alone = "." if len(steps) == 1 else ""  # one point makes no line
        axes.plot(steps, values, color="#9db4d6", linewidth=0.8, marker=alone, label="training")
        steps, values = _series(validation)
        axes.plot(steps, values, color="#1f3f7a", marker="o", markersize=4, label="validation")
        for (label, value), dashes in zip((baselines or {}).items(), itertools.cycle(("--", ":", "-."))):
            words = f"{label}, {value:.2f} bits per byte"
            axes.axhline(value, color="#b5542a", linestyle=dashes, linewidth=1.2, label=words)
        axes.set_xlabel("training, optimizer steps")
        axes.set_ylabel("loss, bits per byte")
    return axes


def _legend(figure: Figure, axes: Axes, note: str) -> None:
    """A legend of as many columns as fit below the axes; the figure grows by its height."""
    for columns in (3, 2, 1):
        legend = figure.legend(
            *axes.get_legend_handles_labels(),
            title=note,
            title_fontsize=8,
            fontsize=8,
            frameon=False,
            ncols=columns,
            handlelength=4,
            loc="outside lower center",
        )
        for text in legend.get_texts():
            text.set_parse_math(False)
        box = legend.get_window_extent()
        width, height = box.width / figure.dpi + MARGIN, box.height / figure.dpi + MARGIN
        if columns == 1 or width <= WIDTH:
            figure.set_size_inches(max(WIDTH, width), HEIGHT + height)
            return
        legend.remove()


def _series(entries: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[float]]:
    finite = [entry for entry in entries if math.isfinite(entry["bits_per_byte"])]
    return [entry["step"] for entry in finite], [entry["bits_per_byte"] for entry in finite]
