"""One document out of the bytes or the value it is stored as, or one sentence that says what is wrong with it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

BOM = b"\xef\xbb\xbf"

# What a file that is not UTF-8 may be instead, told from its first bytes.
_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"PK\x03\x04": "zip",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
_KINDS = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}


class DataError(ValueError):
    """A fault of a corpus. The message is one sentence that names the file and the line, row or record.

    Lines are numbered from 1, as editors do; rows of a table and records of an ArrayRecord from 0, as their libraries do.

    Attributes:
        kind: what is wrong in a few words, without the place: documents that are left out are counted by it.
    """

    def __init__(self, message: str, kind: str = "unreadable") -> None:
        super().__init__(message)
        self.kind = kind


def decode(data: bytes, where: str, *, count_lines: bool = False) -> str:
    """The text of UTF-8 bytes, without a byte order mark.

    Args:
        data: the bytes.
        where: what they are, for the message.
        count_lines: they are a file, and the message should name the line.

    Raises:
        DataError: they are not UTF-8.
    """
    data = data.removeprefix(BOM)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        looks = next((f"; it begins like {kind}" for magic, kind in _MAGIC.items() if data.startswith(magic)), "")
        line = f", line {1 + data.count(b'\n', 0, error.start)}" if count_lines else ""
        raise DataError(f"data.path: {where}{line}: not UTF-8 text{looks}.", "not UTF-8") from None


class Wanted(NamedTuple):
    """What is taken of a record, as one text.

    Attributes:
        records: "text", "completion" or "messages", see `DataConfig`.
        fields: the fields that hold it.
    """

    records: str
    fields: tuple[str, ...]

    def require(self, fields: Sequence[str], where: str) -> None:
        """Raises a DataError if one of its fields is not among the fields."""
        key = "text_field" if self.records == "text" else "records"
        for field in self.fields:
            if field not in fields:
                raise DataError(
                    f"data.{key}: {where} has no field {field!r}; it has {', '.join(fields) or 'none'}.",
                    "no text field" if self.records == "text" else f"no {field}",
                )

    def text(self, record: Mapping[str, Any], where: str) -> str:
        """The text; of other records than "text" a JSON object of the fields, always the same for the same contents.

        Raises:
            DataError: a field is missing or holds something else.
        """
        self.require(list(record), where)
        if self.records == "text":
            return text_of_value(record[self.fields[0]], self.fields[0], where)
        if self.records == "messages":
            taken: dict[str, Any] = {"messages": _messages(record["messages"], where)}
        else:
            taken = {field: text_of_value(record[field], field, where, "records") for field in self.fields}
        try:
            return clean(json.dumps(taken, ensure_ascii=False, sort_keys=True), where)
        except (TypeError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"data.records: {where}: {first_line(error)}.", "not JSON") from None


def wanted_of(records: str, text_field: str) -> Wanted:
    """What a configuration takes of a record."""
    fields = {"text": (text_field,), "completion": ("prompt", "completion"), "messages": ("messages",)}
    return Wanted(records, fields[records])


def _messages(value: Any, where: str) -> list[dict[str, Any]]:
    """The turns; keys that are null are left out, as tables have them where a turn has no such key, but for "content"."""
    if not isinstance(value, list | tuple) or not value:
        raise DataError(f"data.records: {where}: field 'messages' holds no list of turns.", "no messages")
    for number, message in enumerate(value):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise DataError(
                f"data.records: {where}: turn {number} is no object with a role that is text.", "not a conversation"
            )
    if not any(message["role"] == "assistant" for message in value):
        raise DataError(f"data.records: {where}: no turn is the assistant's.", "no turn of the assistant")
    return [{key: item for key, item in turn.items() if item is not None or key == "content"} for turn in value]


def text_of_json(data: bytes, wanted: Wanted, where: str) -> str:
    """The text that is wanted of a JSON object.

    Raises:
        DataError: no UTF-8, no JSON, no object, or not what is wanted in it.
    """
    text = decode(data, where)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"data.path: {where}: not a JSON object ({error.msg.removesuffix(' at')} at column {error.pos + 1}).",
            "not JSON",
        ) from None
    except (ValueError, RecursionError):  # a number of thousands of digits, or brackets in thousands of brackets
        raise DataError(f"data.path: {where}: not a JSON object that can be read.", "not JSON") from None
    if not isinstance(value, dict):
        raise DataError(f"data.path: {where}: not a JSON object but {_kind(value)}.", "not an object")
    return wanted.text(value, where)


def is_json_object(data: bytes) -> bool:
    """Whether the bytes are a JSON object."""
    try:
        return isinstance(json.loads(data.removeprefix(BOM)), dict)
    except (ValueError, RecursionError):
        return False


def text_of_value(value: Any, field: str, where: str, key: str = "text_field") -> str:
    """The text that a field holds, without a byte order mark; `key` is what chose the field.

    Raises:
        DataError: it holds something else, or half of a surrogate pair, which UTF-8 cannot express.
    """
    if value is None:
        raise DataError(f"data.{key}: {where}: field {field!r} holds null, not text.", "null")
    if not isinstance(value, str):
        raise DataError(f"data.{key}: {where}: field {field!r} holds {_kind(value)}, not text.", "not text")
    return clean(value, where)


def clean(text: str, where: str) -> str:
    """The text without a byte order mark at its start; a DataError where it holds a lone surrogate."""
    text = text.removeprefix("\ufeff")
    if (lone := lone_surrogate(text)) is not None:
        raise DataError(
            f"data.path: {where}: character {lone} is U+{ord(text[lone]):04X}, half of a surrogate pair, and no text.",
            "lone surrogate",
        )
    return text


def lone_surrogate(text: str) -> int | None:
    """The place of the first character that UTF-8 cannot express, None where there is none."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None


def first_line(error: BaseException) -> str:
    """What a library says is wrong, in one line and without a full stop."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _kind(value: Any) -> str:
    return "null" if value is None else _KINDS.get(type(value), type(value).__name__)
