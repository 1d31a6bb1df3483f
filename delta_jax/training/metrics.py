"""Metrics as JSON lines and TensorBoard events, and the bytes that tokens stand for."""

import json
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from delta_jax.data import ByteTokenizer, Tokenizer
from delta_jax.models.loss import counted_targets

TRAINING = "metrics.jsonl"
EVALUATION = "evaluation.jsonl"


def count_bytes(tokenizer: Tokenizer, batch: Mapping[str, np.ndarray]) -> int:
    """UTF-8 bytes of text that the targets of a batch which count stand for."""
    ids = batch["targets"][counted_targets(batch["targets"], batch["mask"])]
    if isinstance(tokenizer, ByteTokenizer):
        return len(tokenizer.decode_bytes(ids))
    return len(tokenizer.decode(ids).encode())


def bytes_per_token(tokenizer: Tokenizer, batches: Iterable[Mapping[str, np.ndarray]]) -> float:
    """Mean number of bytes a target stands for; the document id stands for none."""
    counted = [
        (count_bytes(tokenizer, batch), float(counted_targets(batch["targets"], batch["mask"]).sum()))
        for batch in batches
    ]
    return sum(number for number, _ in counted) / max(sum(tokens for _, tokens in counted), 1.0)


class MetricsWriter:
    """Appends to metrics.jsonl, evaluation.jsonl and a TensorBoard folder; every line is on disk when
    written.

    Args:
        output: the run's folder.
        start: the step the run continues from: what an interrupted run wrote beyond it is dropped, so that
            each step stands in the files once.
    """

    def __init__(self, output: Path, start: int):
        for name in (TRAINING, EVALUATION):
            _truncate(output / name, start)
        self._files = {name: (output / name).open("a", buffering=1) for name in (TRAINING, EVALUATION)}
        self._events = EventFileWriter(str(output / "tensorboard"))
        # TensorBoard drops what earlier event files hold from this step on.
        self._events.add_event(
            Event(wall_time=time.time(), step=start + 1, session_log=SessionLog(status=SessionLog.START))
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.close()
        self._events.close()

    def write(self, name: str, step: int, values: Mapping[str, float]) -> None:
        """Append one entry.

        Args:
            name: TRAINING or EVALUATION.
            step: optimizer steps done.
            values: name -> number; written with every digit.
        """
        self._files[name].write(json.dumps({"step": step, **values}) + "\n")
        group = "train" if name == TRAINING else "validation"
        summary = [Summary.Value(tag=f"{group}/{key}", simple_value=value) for key, value in values.items()]
        self._events.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=summary)))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSON-lines file; a last line cut off by a kill is left out, no file is no lines."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _truncate(path: Path, step: int) -> None:
    kept = [line for line in read_metrics(path) if line["step"] <= step]
    draft = path.with_suffix(".tmp")
    draft.write_text("".join(json.dumps(line) + "\n" for line in kept))
    draft.replace(path)
