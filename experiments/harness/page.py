"""The page: every claim with the paper's number, ours and a verdict, then every table with its figure."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments.harness.figures import draw
from experiments.harness.results import Results, Summary, read
from experiments.harness.study import file_name
from experiments.harness.verdicts import Study

__all__ = ["claim_rows", "markdown_table", "section"]

SHOWN = {
    "token": "accuracy",
    "sequence": "whole sequences",
    "macro": "accuracy, mean over classes",
    "loss": "nats",
    "bits": "bits",
}
FEW_SEEDS = 3
"""With fewer, the page says so beside a verdict."""


def claim_rows(study: Study[Any], root: Path) -> Iterator[list[str]]:
    """A row for each claim and scale: claim, the paper's number, ours, scale, verdict."""
    for claim in study.claims:
        judged = 0
        for scale in study.scales:
            files = read(root / study.name / scale, study.layout(scale))
            if not files:
                continue
            try:
                verdict = claim.judge(results := Results(files))
            except KeyError:
                continue
            judged += 1
            few = "" if results.seeds >= FEW_SEEDS else f" ({results.seeds} seed{'s' * (results.seeds > 1)})"
            yield [claim.text, claim.paper, verdict.ours, scale + few, verdict.word]
        if not judged:
            yield [claim.text, claim.paper, "not run", "", "cannot tell"]


def section(study: Study[Any], root: Path) -> str:
    """A study's part of the page; its figures are written beside its results."""
    parts = [f"## {study.title}", f"{study.source}. {study.text}"]
    for scale in study.scales:
        folder = root / study.name / scale
        files = read(folder, study.layout(scale))
        if not files:
            parts.append(f"**{scale}**: not run.")
            continue
        results = Results(files)
        parts += [f"**{scale}**: {_setting(results)}", markdown_table(*_table(study, results))]
        if study.plot:
            for cell in results.cells:
                picture = folder / f"{file_name(cell)}.png"
                if draw(study, results, cell, picture):
                    parts.append(f"![{study.title}, {cell}]({picture.relative_to(root.parent)})")
    return "\n\n".join(parts)


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]], align: str = "---:") -> str:
    """A table; `align` is how all columns but the first are."""
    lines = [head, ["---", *[align] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _setting(results: Results) -> str:
    file = results.files[0]
    model, sweep, machine = file["config"]["model"], file["config"]["sweep"], file["machine"]
    decays = sorted({other["config"]["weight_decay"] for other in results.files})
    rates = sorted({rate for other in results.files for rate in other["config"]["sweep"]["learning_rates"]})
    dates = sorted({other["date"] for other in results.files})
    data = "new sequences at every step" if sweep["train_examples"] is None else f"{sweep['train_examples']} sequences"
    return (
        f"hidden size {model['hidden_size']}, {model['num_layers']} layer(s), batch {sweep['batch_size']}, "
        f"{_span({other['config']['sweep']['steps'] for other in results.files})} steps on {data}, learning rates "
        f"{', '.join(f'{rate:g}' for rate in rates)}, weight decay "
        f"{', '.join(f'{decay:g}' for decay in decays)}, seeds {', '.join(map(str, sweep['seeds']))}; "
        f"{sweep['test_examples']} test sequences. {machine['device']}, {machine['cores']} cores, JAX "
        f"{file['versions']['jax']}, {' to '.join(dict.fromkeys((dates[0], dates[-1])))}. Time: "
        f"{results.seconds / 60:.1f} minutes, of processors {results.cpu_seconds / 60:.1f}."
    )


def _span(numbers: set[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"


def _table(study: Study[Any], results: Results) -> tuple[list[str], list[list[str]]]:
    columns = [(cell, test, metric) for cell in results.cells for test in results.tests(cell) for metric in study.show]
    published = [cell for cell in results.cells if any((cell, arm) in study.published for arm in results.arms)]
    many_cells, many_metrics = len(results.cells) > 1, len(study.show) > 1
    head = ["", "parameters"]
    for cell, test, metric in columns:
        words = [cell] if many_cells else []
        words += [test] if test != cell else []
        words += [SHOWN[metric]] if many_metrics else []
        head.append(", ".join(words))
    head += [f"paper{', ' + cell if many_cells else ''}" for cell in published]
    rows = []
    for arm in results.arms:
        row = [arm, ", ".join(dict.fromkeys(f"{file['parameters']:,}" for file in results.files if file["arm"] == arm))]
        row += [_cell(results, cell, arm, test, metric) for cell, test, metric in columns]
        row += [study.published.get((cell, arm), "") for cell in published]
        rows.append(row)
    return head, rows


def _cell(results: Results, cell: str, arm: str, test: str, metric: str) -> str:
    if not results.of(cell, arm):
        return "not run"
    summary: Summary = results.best(cell, arm, test, metric)
    return str(summary)
