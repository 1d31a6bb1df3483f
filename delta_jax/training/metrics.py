"""Metrics as JSON lines and TensorBoard events."""

import json
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from delta_jax.training.folder import listing, make_way, set_aside
from delta_jax.training.processes import gather, is_first

TRAINING = "metrics.jsonl"
EVALUATION = "evaluation.jsonl"


class MetricsWriter:
    """Appends to metrics.jsonl, evaluation.jsonl and a TensorBoard folder; every line is on disk when
    written. Of several processes the first one writes, and all know what it has written.

    Args:
        output: the run's folder.
        start: the step the run continues from, 0 where it begins: what an interrupted run wrote beyond it is dropped, so
            that each step stands in the files once. What is damaged in them is dropped with a warning.

    Attributes:
        last_evaluation: the step of the last entry of evaluation.jsonl; None where there is none.
    """

    def __init__(self, output: Path, start: int):
        self._files: dict[str, TextIO] = {}
        self._events: EventFileWriter | None = None
        last = self._open(output, start) if is_first() else None
        self.last_evaluation: int | None = gather(last)[0]

    def _open(self, output: Path, start: int) -> int | None:
        """Open the files; the step of the last evaluation in them."""
        kept = {name: _repair(output / name, start) for name in (TRAINING, EVALUATION)}
        self._files = {name: (output / name).open("a", buffering=1) for name in (TRAINING, EVALUATION)}
        self._events = EventFileWriter(str(make_way(output / "tensorboard", folder=True)))
        # TensorBoard drops what earlier event files hold from this step on.
        self._events.add_event(
            Event(wall_time=time.time(), step=start + 1, session_log=SessionLog(status=SessionLog.START))
        )
        return kept[EVALUATION][-1]["step"] if kept[EVALUATION] else None

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.close()
        if self._events is not None:
            self._events.close()

    def write(self, name: str, step: int, values: Mapping[str, float]) -> None:
        """Append one entry.

        Args:
            name: TRAINING or EVALUATION.
            step: optimizer steps done.
            values: name -> number; written with every digit.
        """
        if name == EVALUATION:
            self.last_evaluation = step
        if self._events is None:
            return
        self._files[name].write(json.dumps({"step": step, **values}) + "\n")
        group = "train" if name == TRAINING else "validation"
        summary = [Summary.Value(tag=f"{group}/{key}", simple_value=value) for key, value in values.items()]
        self._events.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=summary)))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The entries of a JSON-lines file, in the order of their steps; what is no entry is left out, no file is none."""
    return _read(path)[0]


def _read(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The entries of a file, and what is wrong with each of its other lines."""
    entries: list[dict[str, Any]] = []
    faults: list[str] = []
    lines = path.read_bytes().split(b"\n") if path.is_file() else [b""]
    if not lines[-1]:
        lines.pop()  # what follows the last line break
    for number, line in enumerate(lines, 1):
        entry = _entry(line)
        if isinstance(entry, str):
            faults.append(f"line {number} {entry}")
        elif entries and entry["step"] <= entries[-1]["step"]:
            faults.append(f"line {number} repeats step {entry['step']}")
        else:
            entries.append(entry)
    return entries, faults


def _entry(line: bytes) -> dict[str, Any] | str:
    """The entry that a line holds, or why it holds none."""
    try:
        entry = json.loads(line.decode())
    except UnicodeDecodeError:
        return "is not UTF-8"
    except (ValueError, RecursionError):
        return "is no JSON" if line.strip(b"\0 \r\t") else "is empty"
    if not isinstance(entry, dict) or type(entry.get("step")) is not int or not {"loss", "bits_per_byte"} <= set(entry):
        return "is no entry with step, loss and bits_per_byte"
    if not all(type(value) is float or (type(value) is int and abs(value) < 2**63) for value in entry.values()):
        return "holds what is no number"
    return entry


def _repair(path: Path, step: int) -> list[dict[str, Any]]:
    """Rewrite a file with its entries up to a step, and return them, none at 0; a damaged file is kept aside as it was."""
    entries, faults = _read(make_way(path))
    if not step and any(entry["step"] for entry in entries):
        faults.append("its run has no checkpoint and begins anew")
    if faults:
        aside = set_aside(path, path.parent, copy=True)
        warnings.warn(f"{path} was repaired: {listing(faults)}; the file as it was is {aside}", stacklevel=4)
    kept = [entry for entry in entries if entry["step"] <= step] if step else []
    draft = make_way(path.with_suffix(".tmp"))
    draft.write_text("".join(json.dumps(entry) + "\n" for entry in kept))
    draft.replace(path)
    return kept
