"""What a corpus and its tokenizer are, in a few numbers: has anything changed since a run began?"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from delta_jax.data.config import DataConfig
from delta_jax.data.examples import template_of
from delta_jax.data.sources import load_documents

_WHOLE = 1 << 26  # bytes of a corpus that is read as a whole
_BLOCKS, _BLOCK = 256, 1 << 16  # of a larger one: this many pieces of this many bytes

_WORDS = {
    "documents": "the corpus had {old:,} documents and has {new:,}",
    "files": "the corpus had {old:,} files and has {new:,}",
    "bytes": "the files of the corpus held {old:,} bytes and hold {new:,}",
    "names": "the files of the corpus have other names or another order than before",
    "sizes": "files of the corpus have other sizes than before",
    "content": "the text of the corpus is not what it was",
    "tokenizer": "the tokenizer is another than before",
    "chat_template": "the chat template is another than before",
}


def fingerprint(config: DataConfig) -> dict[str, Any]:
    """Tells two states of a corpus and its tokenizer apart, wherever they lie and however their paths are spelt.

    Documents and files are counted, names, relative to the folder that the files share, and sizes are digested. So is
    the content: all of it up to 64 MiB, of more the first, the last and evenly spaced pieces, 16 MiB together. A change
    of a large corpus that alters neither sizes nor what is in the sample goes unseen.

    Args:
        config: the corpus and the tokenizer.

    Returns:
        JSON-able: "documents", "files" and "bytes", integers; "names", "sizes", "content" and "tokenizer", digests
        ("bytes" for the byte tokenizer), and where records are messages "chat_template", one of how they are written.

    Raises:
        DataError: as `load_documents`.
        ValueError: there is no such tokenizer, or no chat template beside it where there has to be one.

    Examples:
        >>> import json
        >>> config = DataConfig(path=json.__path__[0] + "/*.py")
        >>> fingerprint(config) == fingerprint(config)
        True
        >>> fingerprint(config)["tokenizer"]
        'bytes'
    """
    documents = load_documents(config)
    files = documents.files
    sizes = [_size(file) for file in files]
    root = os.path.commonpath([os.path.abspath(file.parent) for file in files])
    names = [Path(os.path.relpath(os.path.abspath(file), root)).as_posix() for file in files]
    return {
        "documents": len(documents),
        "files": len(files),
        "bytes": sum(sizes),
        "names": _digest(names),
        "sizes": _digest(sizes),
        "content": _content(files, sizes),
        "tokenizer": _tokenizer(config.tokenizer),
        **({"chat_template": _template(config)} if config.records == "messages" else {}),
    }


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between two fingerprints, in sentences without a full stop; empty where nothing does.

    Args:
        old: the fingerprint of before.
        new: that of now.

    Examples:
        >>> old = {"documents": 3, "files": 3, "bytes": 9, "names": "a", "sizes": "b", "content": "c", "tokenizer": "bytes"}
        >>> differences(old, old)
        []
        >>> len(differences(old, {**old, "documents": 4}))
        1
    """
    found = []
    for key, words in _WORDS.items():
        if key == "chat_template" and key not in old and key not in new:
            continue
        if key not in old or key not in new:
            found.append(f"one of the fingerprints says nothing of the corpus's {key}")
        elif old[key] != new[key]:
            found.append(words.format(old=old[key], new=new[key]))
    # A sum of sizes that differs says it all.
    return [words for words in found if words != _WORDS["sizes"] or old.get("bytes") == new.get("bytes")]


def _size(file: Path) -> int:
    """Bytes of a file, 0 where it cannot be read: that is for the stream to say, or to skip."""
    try:
        return file.stat().st_size
    except OSError:
        return 0


def _digest(values: Sequence[Any]) -> str:
    return hashlib.sha256("\0".join(map(str, values)).encode(errors="surrogateescape")).hexdigest()


def _content(files: Sequence[Path], sizes: Sequence[int]) -> str:
    """A digest of the files end to end, or of pieces of them."""
    ends = np.cumsum([0, *sizes])
    whole = int(ends[-1])
    if whole <= _WHOLE:
        pieces = [(0, whole)]
    else:
        pieces = [(int(start), _BLOCK) for start in np.linspace(0, whole - _BLOCK, _BLOCKS).astype(np.int64)]
    digest = hashlib.sha256()
    for start, length in pieces:
        number = int(np.searchsorted(ends, start, side="right")) - 1
        offset = start - int(ends[number])
        while length > 0 and number < len(files):
            data = _read(files[number], offset, min(length, sizes[number] - offset))
            digest.update(data)
            length, number, offset = length - (sizes[number] - offset), number + 1, 0
    return digest.hexdigest()


def _read(file: Path, start: int, length: int) -> bytes:
    if length <= 0:
        return b""
    try:
        with file.open("rb") as stream:
            stream.seek(start)
            return stream.read(length)
    except OSError:
        return b""


def _template(config: DataConfig) -> str:
    template = template_of(config)
    return _digest([template.source, *(f"{name} {token}" for name, token in sorted(template.tokens.items()))])


def _tokenizer(name: str) -> str:
    if name == "bytes":
        return name
    try:
        return hashlib.sha256(Path(name).read_bytes()).hexdigest()
    except OSError as error:
        raise ValueError(f"data.tokenizer: {name} cannot be read: {error.strerror}.") from None
