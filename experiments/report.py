"""Makes docs/results.md from the results that are there: `python -m experiments.report`."""

import argparse
import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import speedup
from experiments.harness.page import claim_rows, markdown_table, section
from experiments.harness.results import put, read
from experiments.harness.runner import RESULTS, one_sentence
from experiments.harness.verdicts import Study

EXPERIMENTS = (
    "parity",
    "modular_arithmetic",
    "swaps",
    "delta_product",
    "mqar",
    "mad",
    "kimi_synthetic",
    "needles",
    "regbench",
    "selectivbench",
    "language_models",
)

INTRODUCTION = """# The papers' tables

Made by `python -m experiments.report` from the JSON files under [results](results), which `python -m experiments.NAME
[--scale cpu|gpu|paper] [key=value ...]` writes; `--list` shows what would run.

How to read it: a paper's number stands in a column of its own and was taken at the paper's scale; ours says its scale, and
a scaled-down number is evidence for the direction of a claim at most. Every architecture has the same steps, batches and
learning rates unless its row says otherwise; the learning rate is the best on the first test set, and the spread over seeds
is shown. Test sequences are never among those of training. All of it is float32 on a CPU; the published DeltaProduct runs
cast the whole model to bfloat16.
"""


def studies() -> list[Study[Any]]:
    """All experiments that train, in the order of the page."""
    return [importlib.import_module(f"experiments.{name}").STUDY for name in EXPERIMENTS]


def everything(root: Path) -> dict[str, list[dict[str, Any]]]:
    """All results that are there, by scale.

    Raises:
        ValueError: there are none, or a file is not what should be there; the message names it.
    """
    known = {root / study.name / scale: (study, scale) for study in studies() for scale in study.scales}
    timed = {root / speedup.STUDY.name / scale: scale for scale in speedup.STUDY.scales}
    for path in sorted(root.rglob("*.json")):
        if path.parent not in known and path.parent not in timed:
            raise ValueError(f"{path} belongs to no experiment: results are {root}/NAME/SCALE/*.json")
    found: dict[str, list[dict[str, Any]]] = {}
    for folder, (study, scale) in known.items():
        found.setdefault(scale, []).extend(read(folder, study.layout(scale)))
    for folder, scale in timed.items():
        found.setdefault(scale, []).extend(speedup.STUDY.read(folder))
    if not any(found.values()):
        raise ValueError(f"there are no results in {root}: `python -m experiments.parity` is one way to make some")
    return found


def times(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """How long all results of each scale took together."""
    # Of what is timed only the wall is known; it runs alone.
    sums = {
        scale: [sum(file.get(name, file["seconds"]) for file in files) for name in ("seconds", "cpu_seconds")]
        for scale, files in found.items()
    }
    return "\n\n".join(
        f"Everything at scale {scale}: {wall / 60:.0f} minutes of single commands, some of them side by side; of "
        f"processors {cpu / 60:.0f}."
        for scale, (wall, cpu) in sums.items()
        if wall
    )


def make(root: Path) -> None:
    """Writes the page beside the folder of the results, and the figures into it.

    Raises:
        ValueError: see `everything`; nothing has been written.
    """
    found = everything(root)
    rows = [row for study in studies() for row in claim_rows(study, root)] + [*speedup.STUDY.claim_rows(root)]
    parts = [
        INTRODUCTION,
        "## Claims",
        markdown_table(["claim", "paper", "ours", "scale", "verdict"], rows, align="---"),
        times(found),
        *(section(study, root) for study in studies()),
        speedup.STUDY.section(root),
    ]
    page = root.parent / "results.md"
    put(page, "\n\n".join(part.strip() for part in parts) + "\n")
    print(f"{page}: {len(rows)} claims")


def main(arguments: Sequence[str] | None = None, root: Path = RESULTS) -> None:
    """The command; it has no options but `--help`."""
    argparse.ArgumentParser(
        prog="python -m experiments.report",
        description=f"Makes {root.parent / 'results.md'} and its figures from the results in {root}.",
    ).parse_args(arguments)
    with one_sentence("report"):
        make(root)


if __name__ == "__main__":
    main()
