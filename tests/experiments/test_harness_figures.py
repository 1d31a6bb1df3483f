"""Figures can be read: in grey, without the page, and nothing lies over a curve."""

import itertools
import json
import re
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.harness import Results
from experiments.harness.figures import COLORS, LINES, MARKERS, draw
from experiments.harness.results import read
from experiments.report import studies

RESULTS = Path(__file__).parents[2] / "docs" / "results"
STUDIES = {study.name: study for study in studies()}


def _grey(color: str) -> float:
    """How bright a printer without colours makes it, 0 to 1."""
    return float(np.dot(matplotlib.colors.to_rgb(color), (0.299, 0.587, 0.114)))


def _committed(name: str, path: Path) -> Figure:
    """The first figure of results that are there."""
    results = Results(read(RESULTS / name / "cpu"))
    axes = draw(STUDIES[name], results, results.cells[0], path)
    assert axes is not None
    return axes.get_figure(root=True)


@pytest.fixture(scope="module")
def eleven(tmp_path_factory: pytest.TempPathFactory) -> tuple[Figure, Path]:
    """The language models, eleven architectures, as they are on the page."""
    path = tmp_path_factory.mktemp("figures") / "figure.png"
    return _committed("language_models", path), path


def test_eleven_architectures_differ_without_colours(eleven: tuple[Figure, Path]) -> None:
    lines = [line for line in eleven[0].axes[0].lines if not str(line.get_label()).startswith("_")]
    looks = {(line.get_linestyle(), line.get_marker()) for line in lines}
    assert len(lines) == len(looks) == 11
    greys = sorted(_grey(str(line.get_color())) for line in lines)
    assert min(after - before for before, after in itertools.pairwise(greys)) > 0.04
    assert greys[-1] < 0.7, "the lightest is still seen on white"


def test_the_styles_of_many_architectures_are_all_different() -> None:
    number = len(LINES) * len(MARKERS)
    assert len({(LINES[i % len(LINES)], MARKERS[i % len(MARKERS)]) for i in range(number)}) == number
    assert len(set(COLORS)) == len(COLORS)
    study = STUDIES["regbench"]  # has the most
    assert len(study.arms(study.scales["paper"])) == 24 <= number


@pytest.mark.parametrize("name", ["language_models", "parity", "mad"])
def test_the_legend_is_beside_the_axes_and_inside_the_figure(name: str, tmp_path: Path) -> None:
    figure = _committed(name, tmp_path / "figure.png")
    FigureCanvasAgg(figure).draw()
    (legend,) = figure.legends
    box, axes = legend.get_window_extent(), figure.axes[0]
    assert not box.overlaps(axes.get_window_extent())
    assert not box.overlaps(axes.xaxis.label.get_window_extent())
    assert axes.get_window_extent().height > 0.4 * figure.bbox.height
    for part in (box, *(text.get_window_extent() for text in (axes.title, axes.xaxis.label, axes.yaxis.label))):
        assert part.x0 >= 0 and part.x1 <= figure.bbox.width and part.y0 >= 0 and part.y1 <= figure.bbox.height


def test_what_numbers_and_axes_are(eleven: tuple[Figure, Path]) -> None:
    axes = eleven[0].axes[0]
    words = [text.get_text() for text in eleven[0].legends[0].get_texts()]
    assert len(words) == 11 and all(re.fullmatch(r".+, learning rate [\de.-]+", text) for text in words)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("training, optimizer steps", "loss, bits per byte")


def test_a_weight_decay_is_named_where_there_are_several(tmp_path: Path) -> None:
    words = [text.get_text() for text in _committed("mad", tmp_path / "figure.png").legends[0].get_texts()]
    assert words and all(re.fullmatch(r".+, learning rate [\de.-]+, weight decay [\de.-]+", text) for text in words)


def test_the_length_of_training_is_on_the_figure(tmp_path: Path) -> None:
    axes = _committed("parity", tmp_path / "figure.png").axes[0]
    above = axes.child_axes[0].get_xticklabels()
    assert [label.get_text() for label in above] == ["length of training, 40 tokens"]
    assert axes.lines[-1].get_xdata() == [40, 40]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("position in the sequence, tokens", "accuracy at the position")
    assert axes.get_title().endswith("test set 256")


def test_the_same_results_make_the_same_bytes(eleven: tuple[Figure, Path], tmp_path: Path) -> None:
    """Also for a user with settings of matplotlib."""
    with matplotlib.rc_context({"axes.facecolor": "black", "font.size": 20.0, "savefig.dpi": 30}):
        _committed("language_models", tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == eleven[1].read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["again.png"]


def test_runs_without_a_curve_make_no_figure(tmp_path: Path) -> None:
    results = Results(read(RESULTS / "language_models" / "cpu"))
    files = json.loads(json.dumps(results.files))
    for run in itertools.chain(*(file["runs"] for file in files)):
        run["history"] = []
    assert draw(STUDIES["language_models"], Results(files), results.cells[0], tmp_path / "figure.png") is None
    assert not list(tmp_path.iterdir())
