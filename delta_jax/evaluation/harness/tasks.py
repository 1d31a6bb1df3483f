"""Tasks of lm-evaluation-harness; importing this file imports lm_eval."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table

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


def table(results: dict[str, Any]) -> str:
    """The results, and those of groups of tasks, as the harness prints them."""
    return "\n".join(make_table(results, column) for column in ("results", "groups") if results.get(column))
