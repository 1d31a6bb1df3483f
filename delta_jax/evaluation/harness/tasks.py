"""Tasks of lm-evaluation-harness; importing this file imports lm_eval."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

__all__ = ["Tasks", "run_tasks", "table"]


class Tasks(TaskManager):
    """The harness's tasks, with a sentence for those that cannot be loaded."""

    def load(self, task_list: Any) -> Any:
        try:
            return super().load(task_list)
        except Exception as error:  # a task file may fail in any way
            network = ": its data set is fetched from the Hugging Face hub once, which takes a network"
            said = " ".join(str(error).split()).rstrip(".") or type(error).__name__
            names = ", ".join(map(str, task_list))
            raise ValueError(
                f"tasks: {names} cannot be loaded{network if isinstance(error, OSError) else ''}: {said}"
            ) from error


def find_tasks(names: Sequence[str], include_path: str | Path | None) -> tuple[list[str], Tasks]:
    """The tasks that names, groups and patterns such as mmlu_* mean.

    Raises:
        ValueError: there is no folder of that name, or no such task.
    """
    if not names or isinstance(names, str):
        raise ValueError(f"tasks must be the names of at least one task, got {names!r}")
    if include_path is not None and not Path(include_path).is_dir():
        raise ValueError(f"include_path: there is no folder {str(include_path)!r}")
    folder = None if include_path is None else str(include_path)
    if folder is not None:  # reading all the files of the harness's own tasks takes seconds
        own = Tasks(include_path=folder, include_defaults=False)
        if set(names) <= set(own.all_subtasks):
            return list(names), own
    tasks, found = Tasks(include_path=folder), []
    for name in names:
        matches = [name] if name.endswith(".yaml") and Path(name).is_file() else tasks.match_tasks([name])
        if not matches:
            close = difflib.get_close_matches(name, tasks.all_tasks, 3)
            hint = (
                f"; did you mean {' or '.join(close)}?" if close else f" among the {len(tasks.all_tasks):,} there are"
            )
            raise ValueError(f"tasks: there is no {name!r}{hint}")
        found += [match for match in matches if match not in found]
    return found, tasks


def run_tasks(lm: Any, names: list[str], tasks: Tasks, **options: Any) -> dict[str, Any]:
    """What `simple_evaluate` of the harness returns, without its log of every sample unless asked for."""
    options = {"log_samples": False, **options}
    results: dict[str, Any] = simple_evaluate(model=lm, tasks=names, task_manager=tasks, **options)
    return results


def table(results: dict[str, Any], column: str = "results", sort_results: bool = False) -> str:
    """The results, or those of "groups" of tasks, as a table in Markdown, in place of the harness's `make_table`.

    That one has its cells prepared by forked processes, which beside the threads of JAX may wait for ever.
    """
    rows = [("Tasks" if column == "results" else "Groups", "Version", "Filter", "n-shot", "Metric", "Value", "Stderr")]
    measured = results[column]
    for name in sorted(measured) if sort_results else measured:
        first = (str(measured[name].get("alias", name)), str(results.get("versions", {}).get(name, "")))
        shots = str(results.get("n-shot", {}).get(name, ""))
        for key, value in sorted(measured[name].items()):
            metric, _, kind = key.partition(",")
            if kind and not metric.endswith("_stderr"):
                error = measured[name].get(f"{metric}_stderr,{kind}")
                rows.append((*first, kind, shots, metric, _cell(value), _cell(error)))
                first = ("", "")
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    lines = [
        "|" + "|".join(f" {cell:<{width}} " for cell, width in zip(row, widths, strict=True)) + "|" for row in rows
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]) + "\n"


def _cell(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else "" if value in (None, "N/A") else str(value)
