"""Safetensors files: headers checked before anything is read, rows read and written a slab at a time.

A file is eight bytes, the length n of a header (little-endian); n bytes of JSON, name -> dtype, shape and the offsets of its
bytes behind the header; and the bytes. Nothing in it is ever executed. Source: the format's own description (Hugging Face,
safetensors).
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

__all__ = ["Tensor", "raw_bytes", "read_flat", "read_json", "tensors_of_file", "tensors_of_folder", "write_file"]

DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
LONGEST_HEADER = 100_000_000
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
METADATA = {"format": "pt"}


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies.

    Attributes:
        name: what its file calls it.
        dtype: as in the file's header: "F32", "BF16" ...
        shape: its axes, all of them positive.
        path: the file with its numbers.
        begin: its first byte in the file; -1 says that the numbers are not there.
        file: the name of the file that it belongs into.
        place: what orders the tensors of that file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    begin: int
    file: str
    place: int

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * item_size(self.dtype)


@contextmanager
def readable(source: str | Path) -> Iterator[None]:
    """What the system refuses inside, such as a file that may not be read, is a ValueError that names it."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{error.filename or source} cannot be read ({error.strerror or error})") from error


def item_size(dtype: str) -> int:
    """Bytes of one number; of a dtype that this library does not compute with, the bits it is named after."""
    if dtype in DTYPES:
        return DTYPES[dtype].itemsize
    digits = "".join(c for c in dtype.split("_")[0] if c.isdigit())
    return 1 if dtype == "BOOL" or not digits else max(1, int(digits) // 8)


def tensors_of_folder(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint: of one file, or of the files that its index names.

    Args:
        folder: of a checkpoint, or the path of a file.

    Raises:
        ValueError: there is no file, one that the index names is missing, lies elsewhere or holds other tensors, or a
            file is not what the format says; the message names it.
    """
    if folder.is_file():
        return tensors_of_file(folder)
    if (folder / INDEX).is_file():
        return _indexed(folder)
    files = sorted(folder.glob("*.safetensors"))
    if (folder / SINGLE).is_file():
        files = [folder / SINGLE]
    if not files:
        pickles = [path.name for pattern in PICKLES for path in sorted(folder.glob(pattern))]
        hint = f"; {pickles[0]} is a pickle, which is never read: convert it to safetensors" if pickles else ""
        raise ValueError(f'"{folder}" holds no {SINGLE} and no {INDEX}{hint}')
    if len(files) > 1:
        raise ValueError(
            f'"{folder}" holds {len(files)} safetensors files but no {INDEX}, which would say what is where'
        )
    return tensors_of_file(files[0])


def _indexed(folder: Path) -> dict[str, Tensor]:
    path = folder / INDEX
    table = read_json(path)
    names = table.get("weight_map") if isinstance(table, dict) else None
    if not isinstance(names, dict) or not names or not all(isinstance(file, str) for file in names.values()):
        raise ValueError(f"{path}: weight_map must map names of tensors to files")
    found: dict[str, Tensor] = {}
    files = list(dict.fromkeys(names.values()))
    for file in files:
        if not is_file_name(file):
            raise ValueError(f"{path} names the file {file!r}, which is not a safetensors file in the same folder")
    for file in files:
        if not (folder / file).is_file():
            raise ValueError(f"{path} names {file}, which is missing")
        here = tensors_of_file(folder / file)
        for name, tensor in here.items():
            if names.get(name) != file:
                where = f"looks for it in {names[name]}" if name in names else "does not name it"
                raise ValueError(f"{folder / file} holds {name}, but {INDEX} {where}")
            found[name] = tensor
    for name, file in names.items():
        if name not in found:
            raise ValueError(f"{path} looks for {name} in {file}, which does not hold it")
    return found


def is_file_name(name: str) -> bool:
    """Whether it is a safetensors file in the folder itself, and no way out of it."""
    return name == os.path.basename(name) and name.endswith(".safetensors")


def tensors_of_file(path: Path) -> dict[str, Tensor]:
    """The tensors of one file.

    Raises:
        ValueError: the file is cut off, or its header is not what the format says.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(size - 8, LONGEST_HEADER):
            raise ValueError(f"{path} is no whole safetensors file: its header would take {length} of {size} bytes")
        header = _parsed(file.read(length), path)
    begins = 8 + length
    tensors = {
        name: _entry(path, name, entry, size - begins) for name, entry in header.items() if name != "__metadata__"
    }
    spans = sorted((begin, begin + tensor.nbytes, name) for name, (tensor, begin) in tensors.items())
    end = 0
    for begin, stop, name in spans:
        if begin != end:
            fault = "shares bytes with another tensor" if begin < end else "does not follow the tensor before it"
            raise ValueError(f"{path}: the tensor {name} {fault}")
        end = stop
    if end != size - begins:
        raise ValueError(f"{path} has {size - begins - end} bytes more than its tensors take")
    return {name: replace(tensor, begin=begins + begin, place=begin) for name, (tensor, begin) in tensors.items()}


def _parsed(raw: bytes, path: Path) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise ValueError(f"it names {name} twice")
            found[name] = value
        return found

    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: the header is no JSON ({error})") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path}: the header is no JSON object")
    return header


def _entry(path: Path, name: str, entry: Any, room: int) -> tuple[Tensor, int]:
    """A tensor, and the offset of its bytes behind the header."""
    if not name.isprintable():
        raise ValueError(f"{path}: {name!a} is no name of a tensor")
    where = f"{path}: the tensor {name}"
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= set(entry):
        raise ValueError(f"{where} lacks dtype, shape or data_offsets")
    dtype, shape, offsets = (entry[key] for key in ("dtype", "shape", "data_offsets"))
    whole = isinstance(shape, list) and all(type(n) is int and 0 < n < 2**48 for n in shape)
    if not whole:
        raise ValueError(f"{where} has the shape {shape!r}, wanted positive integers")
    if not isinstance(dtype, str):
        raise ValueError(f"{where} has the dtype {dtype!r}, wanted a name such as F32")
    pair = isinstance(offsets, list) and len(offsets) == 2 and all(type(n) is int for n in offsets)
    if not pair or not 0 <= offsets[0] <= offsets[1] <= room:
        raise ValueError(
            f"{where} lies at {offsets!r}, but the file has {room} bytes of tensors: it is cut off or damaged"
        )
    tensor = Tensor(name, dtype, tuple(shape), path, 0, path.name, 0)
    if tensor.nbytes != offsets[1] - offsets[0]:
        raise ValueError(f"{where} has {offsets[1] - offsets[0]} bytes, but {dtype}{shape} takes {tensor.nbytes}")
    return tensor, offsets[0]


def read_json(path: Path) -> Any:
    """What a JSON file says.

    Raises:
        ValueError: it cannot be read or is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from error


def read_flat(tensor: Tensor, start: int, count: int) -> np.ndarray:
    """`count` numbers from the number `start` on, in the file's order.

    A plain read: a mapped file would stay in memory as long as any of it is in use.
    """
    dtype = DTYPES[tensor.dtype]
    if tensor.begin < 0:
        raise ValueError(f'"{tensor.path.parent}" says what a checkpoint was cut into, but holds none of its weights')
    with tensor.path.open("rb") as file:
        file.seek(tensor.begin + start * dtype.itemsize)
        numbers = np.fromfile(file, dtype, count)
    if numbers.size < count:
        raise ValueError(f"{tensor.path} is cut off inside {tensor.name}")
    return numbers


def raw_bytes(tensor: Tensor, most: int = 1 << 24) -> Iterator[bytes]:
    """The bytes of a tensor, in pieces."""
    with tensor.path.open("rb") as file:
        file.seek(tensor.begin)
        for begin in range(0, tensor.nbytes, most):
            yield file.read(min(most, tensor.nbytes - begin))


def write_file(
    path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]], data: Callable[[str], Iterable[bytes]]
) -> None:
    """Writes a file whose tensors come piece by piece.

    Args:
        path: the file.
        tensors: name -> dtype and shape, in the order in which they are written.
        data: name -> the tensor's bytes, in pieces.

    Raises:
        ValueError: the bytes are not as many as a tensor has.
    """
    header: dict[str, Any] = {"__metadata__": METADATA}
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + math.prod(shape) * item_size(dtype)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, (dtype, shape) in tensors.items():
            written = sum(file.write(piece) for piece in data(name))
            if written != math.prod(shape) * item_size(dtype):
                raise ValueError(f"{path}: {name} is {dtype}{list(shape)}, but {written} bytes came")
