"""The figures of the page: the chosen runs of every architecture, over training or over the positions of a sequence."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from delta_jax.training.plots import picture
from experiments.harness.results import Results
from experiments.harness.verdicts import Study

__all__ = ["COLORS", "LINES", "MARKERS", "draw"]

COLORS = (
    "#013470",
    "#dc7647",
    "#1c863b",
    "#7a2074",
    "#d1a743",
    "#1b9ab0",
    "#8b121d",
    "#966bca",
    "#146391",
    "#5cb7b9",
    "#c33e61",
)
"""In grey eleven equal steps of brightness, from 0.17 to 0.66; neighbours differ most."""

LINES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", "*", ">", "p")
"""With the lines 44 different pairs, for the numbers of both have no divisor in common."""

MARKS = 8
"""Markers on a curve of many points."""

AXES = {
    "token": "accuracy of the {}s",
    "sequence": "whole sequences right, share",
    "macro": "accuracy, mean over classes",
    "loss": "loss, nats per {}",
    "bits": "loss, bits per {}",
}


def draw(study: Study[Any], results: Results, cell: str, path: Path) -> Axes | None:
    """Accuracy over positions or the metric over steps, with a band from the lowest to the highest seed, as a PNG.

    Args:
        study: its `plot` says which.
        results: where the runs are.
        cell: the problem.
        path: the file to write.

    Returns:
        What was drawn; None, and no file, where there is no curve.
    """
    arms = [arm for arm in results.arms if results.of(cell, arm)]
    chosen = {arm: results.chosen(cell, arm) for arm in arms}
    curves = {arm: _curve(study, results, cell, runs) for arm, runs in chosen.items()}
    if not any(len(x) for x, _ in curves.values()):
        return None
    tests, over_positions = results.tests(cell), study.plot == "positions"
    test = tests[-1] if over_positions else tests[0]
    decays = {decay for arm in arms for _, decay, _ in results.runs(cell, arm)}
    title = f"{study.title}: {cell}" + f"; test set {test}" * (test != cell)
    with picture(path, title=title, note="lines: mean over seeds; bands: lowest to highest seed", dpi=110) as axes:
        for index, (arm, (x, values)) in enumerate(curves.items()):
            if not len(x):
                continue
            color = COLORS[index % len(COLORS)]
            rare = max(1, len(x) // MARKS)
            rate, decay = chosen[arm][0]["learning_rate"], chosen[arm][0]["weight_decay"]
            axes.fill_between(x, values.min(axis=0), values.max(axis=0), color=color, alpha=0.12, linewidth=0)
            axes.plot(
                x,
                values.mean(axis=0),
                color=color,
                linestyle=LINES[index % len(LINES)],
                marker=MARKERS[index % len(MARKERS)],
                markersize=5,
                markevery=(index % rare, rare),
                label=f"{arm}, learning rate {rate:g}" + f", weight decay {decay:g}" * (len(decays) > 1),
            )
        length = _training_length(results, cell) if over_positions else None
        if length is not None:
            axes.axvline(length, color="#777777", linestyle=(0, (1, 2)), linewidth=1)
            above = axes.secondary_xaxis("top")  # where no curve is
            above.set_xticks([length], [f"length of training, {length} tokens"], fontsize=8)
        axes.set_xlabel("position in the sequence, tokens" if over_positions else "training, optimizer steps")
        axes.set_ylabel("accuracy at the position" if over_positions else AXES[study.metric].format(study.answer))
    return axes


def _curve(
    study: Study[Any], results: Results, cell: str, runs: Sequence[Mapping[str, Any]]
) -> tuple[list[int], np.ndarray]:
    """The points that all runs have, and [runs, points] values."""
    lines = [_line(study, results, cell, run) for run in runs]
    length = min(len(x) for x, _ in lines)
    return lines[0][0][:length], np.array([y[:length] for _, y in lines], float)


def _line(study: Study[Any], results: Results, cell: str, run: Mapping[str, Any]) -> tuple[list[int], list[float]]:
    if study.plot == "steps":
        history = [entry for entry in run["history"] if entry[study.metric] is not None]
        return [entry["step"] for entry in history], [entry[study.metric] for entry in history]
    curve = run["tests"][results.tests(cell)[-1]].get("curve", {"position": [], "token": []})
    return curve["position"], curve["token"]


def _training_length(results: Results, cell: str) -> int | None:
    """The last position of the test set that is drawn like the training set; None where there is none."""
    file = next(file for file in results.files if file["cell"] == cell)
    for name, task in file["config"]["tests"].items():
        if task == file["config"]["task"]:
            positions = file["runs"][0]["tests"][name].get("curve", {"position": []})["position"]
            return positions[-1] if positions else None
    return None
