"""The loss curve says what it shows, covers nothing, and is the same file for the same run."""

import math
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from delta_jax.training.plots import picture, plot_curve


def _entries(*steps: int) -> list[dict[str, Any]]:
    return [{"step": step, "bits_per_byte": 8 - step / 100} for step in steps]


def test_the_curve(tmp_path: Path) -> None:
    baselines = {"byte bigram": 3.5, "_cost in $ and $_": 2.25}
    axes = plot_curve(tmp_path / "curve.png", _entries(*range(1, 300)), _entries(0, 100, 200), baselines)
    figure = axes.get_figure(root=True)
    (legend,) = figure.legends
    assert axes.get_ylabel() == "loss, bits per byte" and axes.get_xlabel() == "training, optimizer steps"
    words = [text.get_text() for text in legend.get_texts()]
    assert words[:3] == ["training", "validation", "byte bigram, 3.50 bits per byte"]
    assert len({(line.get_linestyle(), line.get_marker(), line.get_color()) for line in axes.lines}) == 4
    FigureCanvasAgg(figure).draw()
    assert not legend.get_window_extent().overlaps(axes.get_tightbbox())
    assert legend.get_window_extent().x0 >= 0 and legend.get_window_extent().x1 <= figure.bbox.width


def test_the_same_run_makes_the_same_bytes(tmp_path: Path) -> None:
    plot_curve(tmp_path / "one.png", _entries(1, 2, 3), _entries(0, 3))
    with matplotlib.rc_context({"lines.linewidth": 9.0, "axes.facecolor": "black"}):
        plot_curve(tmp_path / "two.png", _entries(1, 2, 3), _entries(0, 3))
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


def test_a_single_step_is_a_point_and_what_is_not_finite_is_left_out(tmp_path: Path) -> None:
    lost = [*_entries(1), {"step": 2, "bits_per_byte": math.nan}]
    training, validation = plot_curve(tmp_path / "curve.png", lost, []).lines
    assert list(training.get_xdata()) == [1] and training.get_marker() == "."
    assert not len(validation.get_xdata())


def test_a_picture_that_cannot_be_drawn_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), picture(path) as axes:
        axes.plot([1, 2], [1, 1 // 0])
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1
