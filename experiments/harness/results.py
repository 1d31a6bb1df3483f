"""Results on disk: one JSON file for each group of runs, and what is read out of them."""

import datetime
import hashlib
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from experiments.harness.layout import TRAINED, misfit
from experiments.harness.study import LOWER_IS_BETTER, Group

__all__ = ["Results", "Summary", "check_writable", "digest", "identity", "locked", "name_runs", "put", "read", "write"]

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


@dataclass(frozen=True)
class Summary:
    """A metric of the runs with the best learning rate (and weight decay), one value for each seed."""

    learning_rate: float
    weight_decay: float
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def low(self) -> float:
        return min(self.values)

    @property
    def high(self) -> float:
        return max(self.values)

    def __str__(self) -> str:
        if len(self.values) == 1:
            return f"{self.mean:.3f}"
        return f"{self.mean:.3f} ({self.low:.3f} to {self.high:.3f})"


class Results:
    """The results of one study at one scale.

    Args:
        files: what `read` gave.
    """

    def __init__(self, files: Sequence[Mapping[str, Any]]):
        self.files = tuple(files)

    @property
    def cells(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(file["cell"] for file in self.files))

    @property
    def arms(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(file["arm"] for file in self.files))

    def of(self, cell: str, arm: str) -> list[Mapping[str, Any]]:
        """The files of one architecture on one problem: one for each weight decay, or also for each rate."""
        return [file for file in self.files if file["cell"] == cell and file["arm"] == arm]

    def tests(self, cell: str) -> tuple[str, ...]:
        """Names of the test sets; the first selects.

        Raises:
            KeyError: the problem was not run.
        """
        if cell not in self.cells:
            raise KeyError(cell)
        return tuple(next(file["config"]["tests"] for file in self.files if file["cell"] == cell))

    def runs(self, cell: str, arm: str) -> list[tuple[float, float, Mapping[str, Any]]]:
        """Learning rate, weight decay and run.

        Raises:
            KeyError: there is none.
        """
        if not self.of(cell, arm):
            raise KeyError(f"{cell}, {arm}")
        return [
            (run["learning_rate"], file["config"]["weight_decay"], run)
            for file in self.of(cell, arm)
            for run in file["runs"]
        ]

    def chosen(self, cell: str, arm: str) -> list[Mapping[str, Any]]:
        """The runs, one a seed, with the learning rate and weight decay that do best on the first test set.

        Best is by the mean over seeds of the study's metric, and where that is equal by the loss.
        """
        choices: dict[tuple[float, float], list[Mapping[str, Any]]] = {}
        for rate, decay, run in self.runs(cell, arm):
            choices.setdefault((rate, decay), []).append({**run, "weight_decay": decay})
        metric = self.of(cell, arm)[0]["config"]["metric"]
        first = self.tests(cell)[0]

        def quality(runs: list[Mapping[str, Any]]) -> tuple[float, float]:
            losses = [value(run["tests"][first], "loss") for run in runs]
            scores = [value(run["tests"][first], metric) for run in runs]
            return statistics.fmean(scores) * (-1 if metric in LOWER_IS_BETTER else 1), -statistics.fmean(losses)

        return max(choices.values(), key=quality)

    def best(self, cell: str, arm: str, test: str, metric: str) -> Summary:
        """A metric of the `chosen` runs on one of the test sets."""
        runs = self.chosen(cell, arm)
        values = tuple(value(run["tests"][test], metric) for run in runs)
        return Summary(runs[0]["learning_rate"], runs[0]["weight_decay"], values)

    def beyond(self, cell: str, arm: str, test: str, position: int) -> Summary:
        """Accuracy of the `chosen` runs on the positions of a test set after the first `position`."""
        runs = self.chosen(cell, arm)
        curves = [run["tests"][test]["curve"] for run in runs]
        values = tuple(
            statistics.fmean(
                hit for place, hit in zip(curve["position"], curve["token"], strict=True) if place > position
            )
            for curve in curves
        )
        return Summary(runs[0]["learning_rate"], runs[0]["weight_decay"], values)

    def every(self, cell: str, arm: str, test: str, metric: str) -> tuple[float, ...]:
        """A metric of all runs, of every learning rate and seed."""
        return tuple(value(run["tests"][test], metric) for _, _, run in self.runs(cell, arm))

    @property
    def seeds(self) -> int:
        """The least number of seeds that any group has."""
        return min(len(file["config"]["sweep"]["seeds"]) for file in self.files)

    @property
    def seconds(self) -> float:
        """Wall time of all groups together."""
        return sum(file["seconds"] for file in self.files)

    @property
    def cpu_seconds(self) -> float:
        """Processor time of all groups together."""
        return sum(file["cpu_seconds"] for file in self.files)


def value(scores: Mapping[str, Any], metric: str) -> float:
    """A metric; a loss that was not finite is infinite."""
    found = scores[metric]
    return float("inf") if found is None else float(found)


def digest(group: Group) -> str:
    """Twelve hexadecimal digits of all that a group's results depend on."""
    text = json.dumps([group.study, group.cell, group.arm, group.table()], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def identity(file: Mapping[str, Any]) -> str:
    """What no two files of a folder have in common: problem, architecture, weight decay and learning rates."""
    config = file["config"]
    return name_runs(file["cell"], file["arm"], config["weight_decay"], config["sweep"]["learning_rates"])


def name_runs(cell: str, arm: str, weight_decay: float, rates: Sequence[float]) -> str:
    """The same of a group that may have no file yet."""
    return f"{cell}/{arm}/{weight_decay}/{list(rates)}"


def read(
    folder: Path, layout: Mapping[str, Any] = TRAINED, same: Callable[[Mapping[str, Any]], object] = identity
) -> list[dict[str, Any]]:
    """The results in a folder, in the order in which they were declared.

    Args:
        folder: where they are; none is there if it does not exist.
        layout: what every file must hold, see `misfit`.
        same: what no two files may have in common.

    Raises:
        ValueError: a file is no JSON, or no results of this kind, or holds those of another again; the message names it.
    """
    files: list[dict[str, Any]] = []
    places: dict[object, Path] = {}
    for path in sorted(folder.glob("*.json")):
        try:
            file = json.loads(path.read_text())
        except (ValueError, OSError, RecursionError) as error:
            raise ValueError(f"results in {path} cannot be read: {error}") from error
        if (words := misfit(file, layout)) is not None:
            raise ValueError(f"results in {path} cannot be read: {words}")
        other = places.setdefault(same(file), path)
        if other != path:
            raise ValueError(f"{other} and {path} hold results of the same runs: remove one of them")
        files.append(file)
    return sorted(files, key=lambda file: file["order"])


def write(path: Path, group: Group, order: int, outcome: Mapping[str, Any], command: str) -> None:
    """Writes a group's results in one move, with what they depend on and where they were taken."""
    device = jax.devices()[0]
    table = {
        "study": group.study,
        "scale": group.scale,
        "cell": group.cell,
        "arm": group.arm,
        "order": order,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": command,
        "versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
        "machine": {
            "device": device.device_kind if device.platform != "cpu" else _cpu_name(),
            "platform": device.platform,
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        },
        **outcome,
        "config": group.table(),
    }
    text = json.dumps(table, separators=(",", ":"))
    put(path, text.replace('{"learning_rate"', '\n{"learning_rate"').replace('"config":', '\n"config":') + "\n")


def put(path: Path, text: str) -> None:
    """Writes a file in one move, so that a kill or another process leaves it whole."""
    draft = path.with_name(f"{path.name}.{os.getpid()}.draft")
    draft.write_text(text)
    draft.replace(path)


def check_writable(folder: Path) -> None:
    """Makes a folder, and sees that files can be written there.

    Raises:
        ValueError: they cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise ValueError(f"output folder {folder} cannot be written: {error.strerror}") from error


@contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Whether this process has a file for itself; the lock goes with the process, however it ends.

    The file stays: were it removed, a process that had opened it before would hold a lock that no other sees.
    """
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


BUSY = 0.5  # the load average before a run above which its timings are no measurement


def machine() -> dict[str, Any]:
    """The processor, its number of cores, the load at this moment, and the interpreter."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "system": platform.platform(),
    }


def _cpu_name() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
