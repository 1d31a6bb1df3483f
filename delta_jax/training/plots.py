"""The loss curve of a run as a picture."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def plot_curve(
    path: Path,
    training: Sequence[Mapping[str, Any]],
    validation: Sequence[Mapping[str, Any]],
    baselines: Mapping[str, float] | None = None,
) -> None:
    """Draw bits per byte over steps, training and validation, and horizontal baselines, into a PNG.

    Args:
        path: the file to write.
        training: entries with "step" and "bits_per_byte".
        validation: the same, of the evaluations.
        baselines: label -> bits per byte.
    """
    figure = Figure(figsize=(7.0, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps, values = _series(training)
    axes.plot(steps, values, color="#9db4d6", linewidth=0.8, label="training")
    steps, values = _series(validation)
    axes.plot(steps, values, color="#1f3f7a", marker="o", markersize=4, label="validation")
    for label, value in (baselines or {}).items():
        axes.axhline(value, color="#b5542a", linestyle="--", linewidth=1, label=f"{label} ({value:.2f})")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("bits per byte")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def _series(entries: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[float]]:
    finite = [entry for entry in entries if math.isfinite(entry["bits_per_byte"])]
    return [entry["step"] for entry in finite], [entry["bits_per_byte"] for entry in finite]
