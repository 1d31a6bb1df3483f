"""Documents of a corpus as a random-access sequence of texts, whatever format they are stored in."""

from __future__ import annotations

import functools
import glob
import json
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from delta_jax.data.config import DataConfig

EMBEDDED = "stdlib"

_SUFFIXES = {
    "jsonl": frozenset({".jsonl", ".ndjson"}),
    "parquet": frozenset({".parquet"}),
    "arrayrecord": frozenset({".arrayrecord", ".array_record"}),
    "text": frozenset({".txt", ".text", ".md", ".rst", ".tex", ".py"}),
}
_NOT_EMBEDDED = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})


class Documents(Protocol):
    """A corpus: `len(documents)` texts, each read when asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> str: ...


def load_documents(config: DataConfig) -> Documents:
    """Opens the corpus that the configuration names.

    One text file is one document; JSONL has one a line, Parquet and Hugging Face datasets one a row,
    ArrayRecord one a record. Files are taken in sorted order; hidden files, empty files and blank lines are
    left out.

    Args:
        config: the corpus (`path`, `format`, `text_field`).

    Returns:
        The documents; text is read on access, so that a corpus may be larger than the memory.

    Raises:
        ValueError: nothing lies at `path`, its format cannot be told, it holds no document, or the first
            document lacks the text field. Later documents are checked when they are read.
    """
    documents: Documents
    if config.path == EMBEDDED:
        documents = TextFiles(_embedded_files())
    else:
        kind, files = _find(config.path, config.format)
        if kind == "huggingface":
            documents = HuggingFaceRows(files[0], config.text_field)
        elif kind == "text":
            documents = TextFiles(files)
        elif kind == "jsonl":
            documents = JsonLines(files, config.text_field)
        elif kind == "parquet":
            documents = ParquetRows(files, config.text_field)
        else:
            documents = ArrayRecords(files, config.text_field)
    if len(documents) == 0:
        raise ValueError(f"data.path: the corpus at {config.path!r} is empty: it holds no document.")
    documents[0]  # a wrong text field should show now, not from inside the pipeline
    return documents


class TextFiles:
    """Each non-empty file is a document."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = [file for file in files if file.stat().st_size > 0]

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> str:
        file = self._files[index]
        try:
            return file.read_bytes().decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"data.path: {file} is not UTF-8 text (byte {error.start}).") from None


class JsonLines:
    """Each non-blank line is a JSON object with the text in a field; an index of the lines is built once."""

    def __init__(self, files: Sequence[Path], field: str) -> None:
        self._files, self._field = list(files), field
        stats = [(file, file.stat()) for file in self._files]
        spans = [_line_spans(file, stat.st_mtime_ns, stat.st_size) for file, stat in stats]
        self._spans = np.concatenate(spans)
        self._first = np.cumsum([0] + [len(one) for one in spans])

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> str:
        number = int(np.searchsorted(self._first, index, side="right")) - 1
        start, length = (int(value) for value in self._spans[index])
        with self._files[number].open("rb") as stream:
            stream.seek(start)
            line = stream.read(length)
        where = f"{self._files[number]}, line at byte {start}"
        return _text_of(_parse_json(line, where), self._field, where)


class ParquetRows:
    """Each row is a document; its row group is decoded when it is read, and the last few groups are kept."""

    def __init__(self, files: Sequence[Path], field: str) -> None:
        import pyarrow
        import pyarrow.parquet

        self._files, self._field = list(files), field
        self._metadata = []
        groups: list[tuple[int, int, int]] = []  # file, row group, rows
        for number, file in enumerate(self._files):
            try:
                with pyarrow.parquet.ParquetFile(file) as table:
                    metadata, columns = table.metadata, table.schema_arrow.names
            except (pyarrow.ArrowInvalid, OSError) as error:
                raise ValueError(f"data.path: {file} is not a readable Parquet file: {error}") from None
            _require_field(self._field, columns, str(file))
            self._metadata.append(metadata)
            groups += [(number, group, metadata.row_group(group).num_rows) for group in range(metadata.num_row_groups)]
        self._groups = groups
        self._first = np.cumsum([0] + [rows for _, _, rows in groups])
        self._column = functools.lru_cache(maxsize=8)(self._read_column)

    def _read_column(self, index: int) -> Any:
        import pyarrow.parquet

        number, group, _ = self._groups[index]
        with pyarrow.parquet.ParquetFile(self._files[number], metadata=self._metadata[number]) as table:
            return table.read_row_group(group, columns=[self._field]).column(0)

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, index: int) -> str:
        group = int(np.searchsorted(self._first, index, side="right")) - 1
        row = int(index - self._first[group])
        file = self._files[self._groups[group][0]]
        return _require_text(self._column(group)[row].as_py(), self._field, f"{file}, row group {group}, row {row}")


class ArrayRecords:
    """Each record is a document: a JSON object with the text field if the first one is, else UTF-8 text."""

    def __init__(self, files: Sequence[Path], field: str) -> None:
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        try:
            self._records = ArrayRecordDataSource([str(file) for file in files])
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"data.path: {files[0]} is not a readable ArrayRecord: {error}") from None
        self._field, self._where = field, str(files[0]) if len(files) == 1 else f"{files[0].parent}"
        self._json = len(self._records) > 0 and _is_json_object(self._records[0])

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> str:
        record, where = self._records[int(index)], f"{self._where}, record {index}"
        if self._json:
            return _text_of(_parse_json(record, where), self._field, where)
        try:
            return str(record.decode())
        except UnicodeDecodeError as error:
            raise ValueError(f"data.path: {where}: not UTF-8 text (byte {error.start}).") from None


class HuggingFaceRows:
    """Each row of a dataset written by `save_to_disk` is a document."""

    def __init__(self, folder: Path, field: str) -> None:
        import datasets

        if (folder / "dataset_dict.json").exists():
            splits = json.loads((folder / "dataset_dict.json").read_text())["splits"]
            raise ValueError(
                f"data.path: {folder} holds several splits ({', '.join(splits)}); name one, as in "
                f"{str(folder / splits[0])!r}."
            )
        try:
            rows = datasets.load_from_disk(str(folder))
        except (FileNotFoundError, ValueError) as error:
            raise ValueError(f"data.path: {folder} is not a Hugging Face dataset saved on disk: {error}") from None
        _require_field(field, rows.column_names, str(folder))
        self._rows, self._field, self._folder = rows.select_columns([field]), field, folder

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> str:
        return _require_text(self._rows[int(index)][self._field], self._field, f"{self._folder}, row {index}")


@functools.cache
def _embedded_files() -> tuple[Path, ...]:
    """Python sources of the standard library, without tests, installed packages and build-time files."""
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for file in sorted(root.rglob("*.py")):
        folders = file.relative_to(root).parts[:-1]
        if _NOT_EMBEDDED.intersection(folders) or any(folder.startswith("config-") for folder in folders):
            continue
        if file.name.startswith("_sysconfigdata") or not _decodes(file):
            continue
        files.append(file)
    return tuple(files)


def _decodes(file: Path) -> bool:
    try:
        file.read_bytes().decode()
    except UnicodeDecodeError:
        return False
    return True


def _find(path: str, kind: str) -> tuple[str, list[Path]]:
    """The format of a corpus and its files (for a Hugging Face dataset: its folder)."""
    root = Path(path).expanduser()
    saved = any((root / name).exists() for name in ("dataset_dict.json", "dataset_info.json"))
    if root.is_dir() and (kind == "huggingface" or (kind == "auto" and saved)):
        return "huggingface", [root]
    if kind == "huggingface":
        raise ValueError(f"data.path: a Hugging Face dataset is a folder, and {path!r} is not one.")

    if root.is_dir():
        files = [
            file
            for file in sorted(root.rglob("*"))
            if file.is_file() and not any(part.startswith(".") for part in file.relative_to(root).parts)
        ]
        if kind not in ("auto", "text"):
            files = [file for file in files if file.suffix in _SUFFIXES[kind]]
    elif root.is_file():
        files = [root]
    else:
        files = sorted(Path(name) for name in glob.glob(str(root), recursive=True) if Path(name).is_file())
        if not files:
            raise ValueError(f"data.path: no file, folder or glob match at {path!r}.")
    if not files:
        wanted = "" if kind in ("auto", "text") else f" with a suffix of {', '.join(sorted(_SUFFIXES[kind]))}"
        raise ValueError(f"data.path: the corpus at {path!r} is empty: no file{wanted}.")
    return (_guess(path, files) if kind == "auto" else kind), files


def _guess(path: str, files: Sequence[Path]) -> str:
    kinds = {suffix: kind for kind, suffixes in _SUFFIXES.items() for suffix in suffixes}
    found = {kinds.get(file.suffix, file.suffix or file.name) for file in files}
    if len(found) == 1 and found <= set(_SUFFIXES):
        return found.pop()
    raise ValueError(
        f"data.format: cannot tell the format of {path!r}, which holds {', '.join(sorted(found)[:5])} files; "
        f"set data.format to one of {', '.join(_SUFFIXES)}, huggingface."
    )


@functools.lru_cache(maxsize=256)
def _line_spans(file: Path, modified: int, size: int) -> np.ndarray:
    """Start and length of every non-blank line, found in blocks so that the file need not fit in memory.

    Kept as long as the file is unchanged (modification time and size): every evaluation opens the corpus
    again.
    """
    ends, position = [], 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 24):
            ends.append(np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + position)
            position += len(block)
    end = np.concatenate([*ends, np.array([position])]).astype(np.int64)
    start = np.concatenate([np.array([0]), end[:-1] + 1]).astype(np.int64)
    keep = end - start >= 2  # the shortest JSON object has two characters
    return np.stack([start, end - start], axis=1)[keep]


def _is_json_object(record: bytes) -> bool:
    try:
        return isinstance(json.loads(record), dict)
    except ValueError:
        return False


def _parse_json(record: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(record)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"data.path: {where}: not a JSON object.")
    return value


def _text_of(record: dict[str, Any], field: str, where: str) -> str:
    _require_field(field, list(record), where)
    return _require_text(record[field], field, where)


def _require_field(field: str, fields: Sequence[str], where: str) -> None:
    if field not in fields:
        raise ValueError(f"data.text_field: {where} has no field {field!r}; it has {', '.join(fields) or 'none'}.")


def _require_text(value: object, field: str, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"data.text_field: {where}: field {field!r} holds {type(value).__name__}, not text.")
    return value
