"""Makes docs/results.md from the results that are there: `python -m experiments.report`."""

import importlib
import sys
from pathlib import Path
from typing import Any

from experiments import speedup
from experiments.harness.page import claim_rows, markdown_table, section
from experiments.harness.results import read
from experiments.harness.runner import RESULTS
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


def times(root: Path) -> str:
    """How long all results of each scale took together."""
    found = {}
    for scale in ("cpu", "gpu", "paper"):
        files = [file for name in (*EXPERIMENTS, speedup.STUDY.name) for file in read(root / name / scale)]
        # Of what is timed only the wall is known; it runs alone.
        found[scale] = [sum(file.get(name, file["seconds"]) for file in files) for name in ("seconds", "cpu_seconds")]
    return "\n\n".join(
        f"Everything at scale {scale}: {wall / 60:.0f} minutes of single commands, some of them side by side; of "
        f"processors {cpu / 60:.0f}."
        for scale, (wall, cpu) in found.items()
        if wall
    )


def main(root: Path = RESULTS) -> None:
    """Writes the page beside the folder of the results, and the figures into it."""
    rows = [row for study in studies() for row in claim_rows(study, root)] + [*speedup.STUDY.claim_rows(root)]
    parts = [
        INTRODUCTION,
        "## Claims",
        markdown_table(["claim", "paper", "ours", "scale", "verdict"], rows, align="---"),
        times(root),
        *(section(study, root) for study in studies()),
        speedup.STUDY.section(root),
    ]
    page = root.parent / "results.md"
    page.write_text("\n\n".join(part.strip() for part in parts) + "\n")
    print(f"{page}: {len(rows)} claims")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"report: {error}")
