"""Documents of a corpus as a random-access sequence of texts, whatever format they are stored in."""

from __future__ import annotations

import functools
import glob
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from delta_jax.data.config import DataConfig
from delta_jax.data.formats import ArrayRecords, HuggingFaceRows, JsonLines, ParquetRows, TextFiles
from delta_jax.data.records import DataError, wanted_of

EMBEDDED = "stdlib"

_SUFFIXES = {
    "jsonl": frozenset({".jsonl", ".ndjson"}),
    "parquet": frozenset({".parquet"}),
    "arrayrecord": frozenset({".arrayrecord", ".array_record"}),
    "text": frozenset({".txt", ".text", ".md", ".rst", ".tex", ".py"}),
}
_COMPRESSED = frozenset({".gz", ".zst", ".bz2", ".xz", ".lz4", ".zip"})
_NOT_EMBEDDED = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})


@runtime_checkable
class Documents(Protocol):
    """A corpus: `len(documents)` texts, each read when asked for.

    Attributes:
        files: the files they are in.
        faults: of the files that cannot be read; each stands for one document, which raises its fault.
    """

    files: tuple[Path, ...]
    faults: dict[int, DataError]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> str:
        """The text; raises a `DataError` where there is none."""
        ...

    def where(self, index: int) -> str:
        """The document's file and its line, row or record there."""
        ...


def load_documents(config: DataConfig) -> Documents:
    """Opens the corpus that the configuration names.

    One text file is one document; JSONL has one a line, Parquet and Hugging Face datasets one a row,
    ArrayRecord one a record. Files are taken in sorted order; hidden files, empty files and blank lines are
    left out. Text is UTF-8 and kept as it is, line ends too, but for a byte order mark at its start. Where records hold more
    than text, a document is a JSON object of what they hold.

    Args:
        config: the corpus (`path`, `format`, `text_field`, `records`, `on_error`).

    Returns:
        The documents; text is read on access, so that a corpus may be larger than the memory.

    Raises:
        DataError: nothing lies at `path`, its format cannot be told or it holds no document; unless bad documents are
            skipped, also if a file cannot be opened or the first document not be read. Later documents are checked
            when they are read.

    Examples:
        >>> import json
        >>> documents = load_documents(DataConfig(path=json.__path__[0] + "/*.py"))
        >>> any("class JSONDecoder" in documents[number] for number in range(len(documents)))
        True
    """
    documents: Documents
    wanted = wanted_of(config.records, config.text_field)
    if config.path == EMBEDDED:
        kind, files = "text", list(_embedded_files())
    else:
        kind, files = _find(config.path, config.format)
    if kind == "text" and config.records != "text":
        raise DataError(
            f"data.records: {config.path!r} is plain text, which holds no {config.records}; wanted records of a format that "
            "has fields, such as jsonl."
        )
    if kind == "huggingface":
        documents = HuggingFaceRows(files[0], wanted)
    elif kind == "text":
        documents = TextFiles(files)
    elif kind == "jsonl":
        documents = JsonLines(files, wanted)
    elif kind == "parquet":
        documents = ParquetRows(files, wanted)
    else:
        documents = ArrayRecords(files, wanted)
    if len(documents) == 0:
        raise DataError(f"data.path: the corpus at {config.path!r} is empty: it holds no document.")
    if config.on_error == "stop":
        for fault in documents.faults.values():
            raise fault
        documents[0]  # a wrong text field should show now, not from inside the pipeline
    return documents


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
        raise DataError(f"data.path: a Hugging Face dataset is a folder, and {path!r} is not one.")

    if root.is_dir():
        # A link that leads nowhere is a file that is missing, and reading it says so.
        files = [
            file
            for file in sorted(root.rglob("*"))
            if (file.is_file() or (file.is_symlink() and not file.exists()))
            and not any(part.startswith(".") for part in file.relative_to(root).parts)
        ]
        if kind not in ("auto", "text"):
            files = [file for file in files if file.suffix in _SUFFIXES[kind]]
    elif root.is_file():
        files = [root]
    else:
        files = sorted(Path(name) for name in glob.glob(str(root), recursive=True) if Path(name).is_file())
        if not files:
            raise DataError(f"data.path: no file, folder or glob match at {path!r}.")
    if not files:
        wanted = "" if kind in ("auto", "text") else f" with a suffix of {', '.join(sorted(_SUFFIXES[kind]))}"
        raise DataError(f"data.path: the corpus at {path!r} is empty: no file{wanted}.")
    return (_guess(path, files) if kind == "auto" else kind), files


def _guess(path: str, files: Sequence[Path]) -> str:
    for file in files:
        if file.suffix in _COMPRESSED:
            raise DataError(f"data.path: {file} is compressed; documents are read at any place, so decompress it.")
    kinds = {suffix: kind for kind, suffixes in _SUFFIXES.items() for suffix in suffixes}
    found = {kinds.get(file.suffix, file.suffix or file.name) for file in files}
    if len(found) == 1 and found <= set(_SUFFIXES):
        return found.pop()
    raise DataError(
        f"data.format: cannot tell the format of {path!r}, which holds {', '.join(sorted(found)[:5])} files; "
        f"set data.format to one of {', '.join(_SUFFIXES)}, huggingface."
    )
