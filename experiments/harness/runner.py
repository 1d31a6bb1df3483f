"""The command line of every experiment: `python -m experiments.NAME [--scale SCALE] [--list] [key=value ...]`."""

import argparse
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from delta_jax.config import load_config, to_dict
from experiments.harness.results import check_writable, digest, identity, locked, name_runs, read, write
from experiments.harness.study import Group
from experiments.harness.training import Interrupted, parameters_of, train_group
from experiments.harness.verdicts import Study

__all__ = ["default_folder", "main", "one_sentence", "parse"]

RESULTS = Path(__file__).parents[2] / "docs" / "results"  # of scales as they are declared
SCRATCH = Path("runs") / "experiments"
ASSUMED_RATES = {"cpu": 8e7, "gpu": 2e11}
"""FLOP/s for each channel of the hidden size, where nothing is recorded: what narrow models reach on a core, and a guess for
a Hopper GPU."""


class Described(Protocol):
    """What the command line needs of an experiment."""

    @property
    def name(self) -> str: ...
    @property
    def title(self) -> str: ...
    @property
    def source(self) -> str: ...
    @property
    def scales(self) -> Mapping[str, Any]: ...


def main(study: Study[Any], arguments: Sequence[str] | None = None) -> None:
    """Runs a study; exits with status 2 and one sentence where the user asks for what is not there."""
    options = parse(study, arguments)
    console = Console()
    with one_sentence(study.name):
        declared = study.scales[options.scale]
        sweep = load_config(type(declared), to_dict(declared), options.overrides)
        groups = study.groups(options.scale, sweep)
        folder = Path(options.output) if options.output else default_folder(study, options)
        known = _known(study, options.scale, folder)
        if options.list:
            _list(study, groups, known, console)
            return
        check_writable(folder)
        check_writable(SCRATCH)
        words = sys.argv[1:] if arguments is None else arguments
        _run(study, groups, folder, known, shlex.join(["python", "-m", f"experiments.{study.name}", *words]), console)


@contextmanager
def one_sentence(name: str) -> Iterator[None]:
    """Ends the process with what went wrong in place of a traceback: status 2 for a mistake of the user, 1 for a run that
    is lost, 130 after Ctrl-C or SIGTERM."""
    try:
        yield
    except (ValueError, OSError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(2)
    except (ArithmeticError, MemoryError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(1)
    except (Interrupted, KeyboardInterrupt):
        print(f"{name}: interrupted; the same command goes on from here.", file=sys.stderr)
        sys.exit(130)


def parse(study: Described, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line of an experiment."""
    parser = argparse.ArgumentParser(
        prog=f"python -m experiments.{study.name}",
        description=f"{study.title}. Source: {study.source}",
        epilog="Results found in the output folder are not run again; a run that was stopped goes on. The same command in a "
        "second terminal shares the work.",
    )
    parser.add_argument("--scale", choices=tuple(study.scales), default="cpu", help="how large (default: cpu)")
    parser.add_argument("--list", action="store_true", help="only show what would run, and what it costs")
    parser.add_argument(
        "--output",
        metavar="FOLDER",
        help="for the results (default: docs/results; with overrides runs/experiments)",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help='such as steps=100 or arms=["DeltaNet"]')
    options = parser.parse_intermixed_args(arguments)
    if options.output == "":
        parser.error("argument --output: wanted a folder, got nothing")
    return options


def default_folder(study: Described, options: argparse.Namespace) -> Path:
    """Where results go that no `--output` is given for: changed scales never meet the declared ones."""
    if not options.overrides:
        return RESULTS / study.name / options.scale
    return SCRATCH / study.name / options.scale


def _known(study: Study[Any], scale: str, folder: Path) -> dict[str, dict[str, Any]]:
    """The results of a scale that are in a folder already; those of anything else would be lost among them."""
    return {identity(file): file for file in read(folder, study.layout(scale))}


def _find(group: Group, known: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    return known.get(name_runs(group.cell, group.arm, group.weight_decay, group.sweep.learning_rates))


def _is_done(group: Group, known: dict[str, dict[str, Any]]) -> bool:
    file = _find(group, known)
    return file is not None and file["config"] == group.table()


def _run(
    study: Study[Any],
    groups: list[Group],
    folder: Path,
    known: dict[str, dict[str, Any]],
    command: str,
    console: Console,
) -> None:
    left = [(order, group) for order, group in enumerate(groups) if not _is_done(group, known)]
    console.print(f"{study.title}: {len(groups)} groups of runs, {len(groups) - len(left)} done before.")
    elsewhere = 0
    for order, group in left:
        name = f"{study.name}-{digest(group)}"
        work = SCRATCH / "unfinished" / name
        with locked(SCRATCH / "locks" / name) as mine:
            if not mine:
                console.print(f"{group.name}: another process is at it", highlight=False, soft_wrap=True)
                elsewhere += 1
                continue
            if _is_done(group, _known(study, group.scale, folder)):
                continue
            with _Display(group.name, group.sweep.steps, console) as display:
                outcome = train_group(group, work, display.update)
            write(folder / f"{group.name}.json", group, order, outcome, command)
            shutil.rmtree(work)
    if elsewhere:
        words = f"{elsewhere} left to other processes; should one of them stop, the same command goes on there."
        console.print(words, highlight=False, soft_wrap=True)
    console.print(
        f"Results: {folder}. The page is made by: python -m experiments.report", highlight=False, soft_wrap=True
    )


class _Display:
    """A bar in a terminal, a line now and then elsewhere."""

    def __init__(self, name: str, steps: int, console: Console):
        self._console, self._name, self._steps, self._last = console, name, steps, 0.0
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TimeElapsedColumn(),
            TextColumn("{task.fields[text]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(name, total=steps, text="compiling")

    def __enter__(self) -> "_Display":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, step: int, steps: int, text: str) -> None:
        """Shows how far it is."""
        self._bar.update(self._task, completed=step, text=text)
        now = time.monotonic()
        if not self._console.is_terminal and (now - self._last > 20 or step == steps):
            self._last = now
            self._console.print(f"{self._name} {step}/{steps} {text}", highlight=False, soft_wrap=True)


def _list(study: Study[Any], groups: list[Group], known: dict[str, dict[str, Any]], console: Console) -> None:
    import jax

    platform = jax.devices()[0].platform
    rate, origin = ASSUMED_RATES.get(platform, ASSUMED_RATES["gpu"]), "assumed"
    measured = [
        _flops(file["parameters"], file["tokens"], len(file["runs"]))
        / (file["seconds"] * file["config"]["model"]["hidden_size"])
        for file in known.values()
        if file["machine"]["platform"] == platform and file["seconds"] and file["config"]["sweep"]["stop_at"] is None
    ]
    if measured:
        rate, origin = sorted(measured)[len(measured) // 2], "reached so far"
    table = Table("cell", "architecture", "runs", "steps", "parameters", "TFLOP", "minutes", "state")
    total = 0.0
    for group in groups:
        sweep = group.sweep
        parameters = parameters_of(group)
        runs = len(sweep.seeds) * len(sweep.learning_rates)
        tokens = sweep.steps * sweep.batch_size * group.task.length
        flops = _flops(parameters, tokens, runs)
        file = _find(group, known)
        done = _is_done(group, known)
        seconds = file["seconds"] if file and done else flops / (rate * sweep.hidden_size)
        total += 0.0 if done else seconds
        state = "done" if done else "settings have changed: runs again" if file else "to do"
        table.add_row(
            group.cell,
            group.arm if len(sweep.weight_decays) == 1 else f"{group.arm}, decay {group.weight_decay:g}",
            f"{len(sweep.learning_rates)} rate(s) x {len(sweep.seeds)} seeds",
            str(sweep.steps),
            f"{parameters:,}",
            f"{flops / 1e12:.1f}",
            f"{seconds / 60:.1f}",
            state,
        )
    console.print(table)
    early = ", less where runs stop early" if any(group.sweep.stop_at is not None for group in groups) else ""
    console.print(
        f"About {total / 60:.0f} minutes to do{early}, at {rate / 1e9:.2g} GFLOP/s for each channel ({origin}).",
        highlight=False,
    )


def _flops(parameters: int, tokens: int, runs: int) -> float:
    """Six for each parameter, token and run: products with weights, forward and backward."""
    return 6.0 * parameters * tokens * runs
