"""The formats of a corpus: each gives its documents as texts, by number."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from delta_jax.data.records import (
    DataError,
    Wanted,
    decode,
    first_line,
    is_json_object,
    text_of_json,
)

_PROBE = 8  # records that are looked at to tell whether they are JSON


class _Files:
    """Documents of several files, one file after the other."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = tuple(files)
        self.faults: dict[int, DataError] = {}
        counts = [0]
        for number, file in enumerate(self.files):
            try:
                counts.append(self._count(number))
            except OSError as error:
                self.faults[number] = _unreadable(file, error)
            except DataError as error:
                self.faults[number] = error
            if number in self.faults:
                counts.append(1)
        self._first = np.cumsum(counts)

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, index: int) -> str:
        number, place = self._place(index)
        if number in self.faults:
            raise self.faults[number]
        try:
            return self._read(number, place)
        except OSError as error:
            raise _unreadable(self.where(index), error) from None

    def where(self, index: int) -> str:
        return self._where(*self._place(index))

    def _place(self, index: int) -> tuple[int, int]:
        """The number of the file and the document's number there."""
        number = int(np.searchsorted(self._first, index, side="right")) - 1
        return number, int(index - self._first[number])

    def _count(self, number: int) -> int:
        """Opens a file; the number of its documents."""
        raise NotImplementedError

    def _read(self, number: int, place: int) -> str:
        raise NotImplementedError

    def _where(self, number: int, place: int) -> str:
        raise NotImplementedError


class TextFiles(_Files):
    """Each non-empty file is a document."""

    def __init__(self, files: Sequence[Path]) -> None:
        super().__init__([file for file in files if not file.exists() or file.stat().st_size > 0])

    def _count(self, number: int) -> int:
        self.files[number].stat()
        return 1

    def _read(self, number: int, place: int) -> str:
        return decode(self.files[number].read_bytes(), str(self.files[number]), count_lines=True)

    def _where(self, number: int, place: int) -> str:
        return str(self.files[number])


class JsonLines(_Files):
    """Each non-blank line is a JSON object with what is wanted in it; an index of the lines is built once."""

    def __init__(self, files: Sequence[Path], wanted: Wanted) -> None:
        self._wanted = wanted
        self._lines: list[np.ndarray] = []
        super().__init__(files)

    def _count(self, number: int) -> int:
        self._lines.append(np.zeros((0, 2), np.int64))
        stat = self.files[number].stat()
        self._lines[number] = _index_of_lines(self.files[number], stat.st_mtime_ns, stat.st_size)
        return len(self._lines[number])

    def _read(self, number: int, place: int) -> str:
        with self.files[number].open("rb") as stream:
            stream.seek(int(self._lines[number][place, 0]))
            line = stream.readline().rstrip(b"\r\n")
        return text_of_json(line, self._wanted, self._where(number, place))

    def _where(self, number: int, place: int) -> str:
        return f"{self.files[number]}, line {self._lines[number][place, 1]}"


class ParquetRows(_Files):
    """Each row is a document; its row group is decoded when it is read, and the last few groups are kept."""

    def __init__(self, files: Sequence[Path], wanted: Wanted) -> None:
        self._wanted = wanted
        self._metadata: list[Any] = []
        self._groups: list[np.ndarray] = []  # the first row of every row group
        self._columns = functools.lru_cache(maxsize=8)(self._read_columns)
        super().__init__(files)

    def _count(self, number: int) -> int:
        import pyarrow
        import pyarrow.parquet

        file = self.files[number]
        self._metadata.append(None)
        self._groups.append(np.zeros(1, np.int64))
        try:
            with pyarrow.parquet.ParquetFile(file) as table:
                metadata, columns = table.metadata, table.schema_arrow.names
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"data.path: {file} is not a readable Parquet file: {first_line(error)}.") from None
        self._wanted.require(columns, str(file))
        rows = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        self._metadata[number], self._groups[number] = metadata, np.cumsum([0, *rows])
        return int(metadata.num_rows)

    def _read_columns(self, number: int, group: int) -> Any:
        """The columns wanted of a row group, or in a string what is wrong with it."""
        import pyarrow
        import pyarrow.parquet

        try:
            with pyarrow.parquet.ParquetFile(
                self.files[number], metadata=self._metadata[number], page_checksum_verification=True
            ) as table:
                return table.read_row_group(group, columns=list(self._wanted.fields))
        except (pyarrow.ArrowException, OSError) as error:
            return first_line(error)

    def _read(self, number: int, place: int) -> str:
        group = int(np.searchsorted(self._groups[number], place, side="right")) - 1
        columns, where = self._columns(number, group), self._where(number, place)
        if isinstance(columns, str):
            raise DataError(f"data.path: {where}: its row group cannot be read: {columns}.")
        row = int(place - self._groups[number][group])
        return _text_of_arrow(
            lambda: {name: columns.column(name)[row].as_py() for name in self._wanted.fields}, self._wanted, where
        )

    def _where(self, number: int, place: int) -> str:
        return f"{self.files[number]}, row {place}"


class ArrayRecords(_Files):
    """Each record is a document: a JSON object if one of the first few is, or more than text is wanted, else UTF-8 text."""

    def __init__(self, files: Sequence[Path], wanted: Wanted) -> None:
        self._wanted = wanted
        self._records: list[Any] = []
        super().__init__(files)
        self._json = wanted.records != "text" or any(self._is_json(index) for index in range(min(len(self), _PROBE)))

    def _is_json(self, index: int) -> bool:
        number, place = self._place(index)
        try:
            return number not in self.faults and is_json_object(self._records[number][place])
        except (RuntimeError, ValueError):
            return False  # the record raises when it is read

    def _count(self, number: int) -> int:
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        self._records.append(())
        try:
            self._records[number] = ArrayRecordDataSource([str(self.files[number])])
        except (RuntimeError, ValueError) as error:
            raise DataError(
                f"data.path: {self.files[number]} is not a readable ArrayRecord: {first_line(error)}."
            ) from None
        return len(self._records[number])

    def _read(self, number: int, place: int) -> str:
        where = self._where(number, place)
        try:
            record = self._records[number][place]
        except (RuntimeError, ValueError) as error:
            raise DataError(f"data.path: {where} cannot be read: {first_line(error)}.") from None
        return text_of_json(record, self._wanted, where) if self._json else decode(record, where)

    def _where(self, number: int, place: int) -> str:
        return f"{self.files[number]}, record {place}"


class HuggingFaceRows:
    """Each row of a dataset written by `save_to_disk` is a document."""

    def __init__(self, folder: Path, wanted: Wanted) -> None:
        import datasets

        if (folder / "dataset_dict.json").exists():
            splits = json.loads((folder / "dataset_dict.json").read_text())["splits"]
            raise DataError(
                f"data.path: {folder} holds several splits ({', '.join(splits)}); name one, as in "
                f"{str(folder / splits[0])!r}."
            )
        self._wanted, self._folder = wanted, folder
        self.files = tuple(file for file in sorted(folder.glob("*.arrow")) if not file.name.startswith("cache-"))
        self.faults: dict[int, DataError] = {}
        try:
            rows = datasets.load_from_disk(str(folder))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _broken_dataset(folder, self.files, error) from None
        wanted.require(rows.column_names, str(folder))
        self._rows: Any = rows.select_columns(list(wanted.fields))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> str:
        return _text_of_arrow(lambda: self._rows[int(index)], self._wanted, self.where(index))

    def where(self, index: int) -> str:
        return f"{self._folder}, row {index}"


def _unreadable(where: object, error: OSError) -> DataError:
    return DataError(f"data.path: {where} cannot be read: {error.strerror or first_line(error)}.")


def _text_of_arrow(read: Callable[[], Mapping[str, Any]], wanted: Wanted, where: str) -> str:
    """The text of a row; Arrow does not check that a string is UTF-8 until it is made one of Python."""
    import pyarrow

    try:
        row = read()
    except UnicodeDecodeError:
        raise DataError(f"data.path: {where}: not UTF-8 text.", "not UTF-8") from None
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"data.path: {where} cannot be read: {first_line(error)}.") from None
    return wanted.text(row, where)


def _broken_dataset(folder: Path, files: Sequence[Path], error: Exception) -> DataError:
    """Names the file of a dataset that is broken, the folder where no file is."""
    import pyarrow

    for file in files:
        try:
            with pyarrow.memory_map(str(file)) as source, pyarrow.ipc.open_stream(source) as reader:
                for _ in reader:
                    pass
        except (pyarrow.ArrowException, OSError) as fault:
            return DataError(f"data.path: {file} is not a readable Arrow file: {first_line(fault)}.")
    return DataError(f"data.path: {folder} is not a Hugging Face dataset saved on disk: {first_line(error)}.")


@functools.lru_cache(maxsize=256)
def _index_of_lines(file: Path, modified: int, size: int) -> np.ndarray:
    """Start and number, from 1, of every non-blank line, found in blocks so that the file need not fit in memory.

    Kept as long as the file is unchanged (modification time and size): every evaluation opens the corpus
    again.
    """
    starts, firsts, position, at_start = [], [], 0, True
    with file.open("rb") as stream:
        while block := stream.read(1 << 24):
            data = np.frombuffer(block, np.uint8)
            begin = np.flatnonzero(data == ord("\n")) + 1
            begin = np.concatenate([np.zeros(int(at_start), begin.dtype), begin[begin < len(data)]])
            at_start = block.endswith(b"\n")
            starts.append(begin + position)
            firsts.append(data[begin])
            position += len(block)
        start = np.concatenate([np.zeros(0, np.int64), *starts])
        first = np.concatenate([np.zeros(0, np.uint8), *firsts])
        keep = first != ord("\n")
        for index in np.flatnonzero(keep & ((first <= ord(" ")) | (first >= 0x80))):  # a line that may be blank
            stream.seek(int(start[index]))
            keep[index] = bool(stream.readline().decode(errors="replace").strip("\ufeff \t\r\n\v\f\u00a0\u3000"))
    return np.stack([start, np.arange(1, len(start) + 1)], axis=1)[keep]
