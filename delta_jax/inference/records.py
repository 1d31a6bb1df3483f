"""Prompts as JSON lines, and their completions as JSON lines that an interrupted run goes on from."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from delta_jax.data.records import lone_surrogate
from delta_jax.inference.completions import Completion

__all__ = ["Results", "read_records"]

type Record = Mapping[str, Any]

COMPLETIONS, MADE_BY = "completions", "made_by"


def read_records(text: str, name: str) -> list[Record]:
    """The prompts of a file of JSON lines: each an object with "prompt", a text, or "messages", a conversation.

    Args:
        text: of the file. Empty lines are left out.
        name: of the file, for messages.

    Returns:
        The objects, whatever else they hold.

    Raises:
        ValueError: a line is no such object, or there is none.
    """
    records: list[Record] = []
    for number, line in enumerate(text.removeprefix("\ufeff").split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line, parse_constant=_no_number)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"line {number} of {name} is not JSON: {error}") from None
        if not isinstance(record, dict) or ("prompt" in record) == ("messages" in record):
            raise ValueError(f'line {number} of {name} should be an object with either "prompt" or "messages"')
        if "prompt" in record and not isinstance(record["prompt"], str):
            raise ValueError(f'line {number} of {name}: "prompt" should be a text')
        if not isinstance(record.get("messages", []), list):
            raise ValueError(f'line {number} of {name}: "messages" should be a list of objects')
        if taken := {COMPLETIONS, MADE_BY} & set(record):
            raise ValueError(f'line {number} of {name} has "{min(taken)}", which is the name of a result')
        records.append(record)
    if not records:
        raise ValueError(f"{name} holds no prompt")
    return records


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number")


class Results:
    """A file of JSON lines, one for each record, in order, written as they come; a context manager.

    A line is the record with "completions", each of which has "text", "tokens" (how many) and "finish_reason", and
    "made_by", a number of the options and the prompt's tokens. What an earlier run wrote stays if it is what this one would
    begin with; a last line that was cut off is written anew.

    Args:
        path: of the file.
        records: the prompts.
        tokens: the ids of each.
        options: JSON-able, all else that decides what follows a prompt.

    Attributes:
        done: how many records the file has already.

    Raises:
        ValueError: the file cannot be written, or holds what other records or options have made.
    """

    def __init__(self, path: str, records: Sequence[Record], tokens: Sequence[Sequence[int]], options: Any):
        said = json.dumps(options, sort_keys=True)
        marks = [hashlib.sha256(f"{said} {[*map(int, ids)]}".encode()).hexdigest()[:16] for ids in tokens]
        self._records = [{**record, MADE_BY: mark} for record, mark in zip(records, marks, strict=True)]
        self._path, self._end, self.done = Path(path), 0, 0
        try:
            with self._path.open("rb") as file:
                for line in file:
                    if not line.endswith(b"\n") and self._is_cut_off(line):
                        break
                    self._check(line)
                    self.done, self._end = self.done + 1, self._end + len(line)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise ValueError(f"output: {path} cannot be read ({error.strerror})") from None

    def _check(self, line: bytes) -> None:
        try:
            found = json.loads(line)
            found.pop(COMPLETIONS)
        except (ValueError, RecursionError, KeyError, AttributeError, TypeError):
            found = None
        if self.done >= len(self._records) or found != self._records[self.done]:
            what = f"line {self.done + 1} of {self._path}"
            if self.done < len(self._records) and isinstance(found, dict):
                rest, wanted = ({**x, MADE_BY: None} for x in (found, self._records[self.done]))
                if rest == wanted:
                    raise ValueError(f"output: {what} was made with other options or another model; name another file")
            raise ValueError(f"output: {what} is no completion of prompt {self.done + 1}; name another file")

    def _is_cut_off(self, line: bytes) -> bool:
        """Whether it may be the beginning of the next line, and not something else that would be lost."""
        if self.done >= len(self._records):
            return False
        begin = line_of(self._records[self.done], []).encode()
        begin = begin[: begin.rindex(b"[]") + 1]
        return line[: len(begin)] == begin[: len(line)]

    def write(self, completions: Sequence[Completion]) -> None:
        """Adds the completions of the next record."""
        self._file.write(line_of(self._records[self.done], completions).encode())
        self._file.flush()
        self.done += 1

    def __enter__(self) -> "Results":
        try:
            self._file = self._path.open("ab")
            self._file.truncate(self._end)
        except OSError as error:
            raise ValueError(f"output: {self._path} cannot be written ({error.strerror})") from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()


def line_of(record: Record, completions: Sequence[Completion]) -> str:
    """A record and its completions, as one line."""
    made_by = {MADE_BY: record[MADE_BY]} if MADE_BY in record else {}
    rest = {key: value for key, value in record.items() if key != MADE_BY}
    found = [{"text": one.text, "tokens": len(one.tokens), "finish_reason": one.finish_reason} for one in completions]
    table = {**rest, COMPLETIONS: found, **made_by}
    line = json.dumps(table, ensure_ascii=False)
    return (line if lone_surrogate(line) is None else json.dumps(table)) + "\n"
