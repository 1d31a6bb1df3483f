"""Writing models as published checkpoints, over the same pieces by which they are read."""

import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array

from delta_jax.config import changes, differences
from delta_jax.interop.architectures import ARCHITECTURES
from delta_jax.interop.architectures.common import function_of, model_of
from delta_jax.interop.checkpoint import (
    CONFIG,
    Checkpoint,
    copy_code,
    copy_companions,
    expected_layout,
    open_checkpoint,
)
from delta_jax.interop.keys import Keys
from delta_jax.interop.layout import Layout, Target, is_table
from delta_jax.interop.read import SLAB
from delta_jax.interop.safetensors import DTYPES, INDEX, SINGLE, item_size, raw_bytes, write_file
from delta_jax.models import LanguageModel, ModelConfig
from delta_jax.parallel import path_string

__all__ = ["published_table", "save_pretrained"]

LARGEST = 5_000_000_000  # bytes of a file
NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}

type Wanted = dict[str, tuple[str, tuple[int, ...]]]


def save_pretrained(
    model: LanguageModel,
    folder: str | Path,
    *,
    format: Literal["transformers", "fla"] | None = None,
    like: str | Path | None = None,
    dtype: str | None = None,
    companions: str | Path | None = None,
    ignore_keys: Sequence[str] = (),
    **keys: Any,
) -> None:
    """Writes a model so that transformers or flash-linear-attention loads it.

    Args:
        model: on devices of this process.
        folder: where config.json and the safetensors files go; there must not be anything yet.
        format: whose classes shall load it; None takes the first that has such a model, transformers before
            flash-linear-attention.
        like: the checkpoint that the model was read from. Its names and cuts of tensors, their dtypes, its config.json, its
            tokenizer, the code of its class where it brings that, and the tensors that were set aside are kept.
        dtype: of the tensors, "float32", "bfloat16" or "float16"; None is the one they were read in, else the parameters'.
        companions: a folder with the files of a tokenizer, which are copied; None is that of `like`.
        ignore_keys: as in `load_pretrained`, for `like`.
        keys: more keys of config.json, such as eos_token_id or max_position_embeddings; not with `like`.

    Raises:
        ValueError: no published class has such a model, or the one of `like` or `format` does not, and the message says why;
            or the folder holds something, or cannot be written. Then nothing is written.

    Examples:
        >>> model = load_pretrained("qwen3_5")
        >>> save_pretrained(model, "again", like="qwen3_5")
        >>> from pathlib import Path
        >>> Path("again/model.safetensors").read_bytes() == Path("qwen3_5/model.safetensors").read_bytes()
        True
    """
    if dtype is not None and dtype not in NAMES:
        raise ValueError(f"dtype must be one of {', '.join(NAMES)}, got {dtype!r}")
    if format not in (None, "transformers", "fla"):
        raise ValueError(f"format must be transformers or fla, got {format!r}")
    leaves = _leaves(model)
    if like is None:
        name, table = published_table(model.config, format)
        layout, _ = expected_layout(ARCHITECTURES[name], model.config, table, None)
        own = NAMES[dtype or str(np.dtype(model.config.param_dtype))]
        wanted: Wanted = {tensor: (own, target.shapes[0]) for tensor, target in layout.targets.items()}
        # The classes' own defaults may lie beyond the vocabulary.
        ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
        table |= ids | {"dtype": dtype or model.config.param_dtype, "transformers_version": "5.23.0"} | keys
        source = None
    else:
        if keys:
            raise ValueError(f"{next(iter(keys))} is a key of config.json, which is that of {like}")
        source = open_checkpoint(like, ignore_keys)
        if format is not None and source.architecture.family != format:
            raise ValueError(f"format is {format}, but {like} is in the format of {source.architecture.family}")
        unequal = differences(function_of(source.model), function_of(model.config))
        if unequal:
            raise ValueError(f"the model is not that of {like}: {'; '.join(unequal[:3])}")
        table, layout = dict(source.table), source.layout
        wanted = {
            tensor: (NAMES[dtype] if dtype and tensor in layout.targets else found.dtype, found.shape)
            for tensor, found in source.tensors.items()
        }
        if dtype:
            table["torch_dtype" if "torch_dtype" in table else "dtype"] = dtype
    for leaf in layout.constant:
        if np.any(np.asarray(leaves[leaf])):
            raise ValueError(f"{leaf} is not zero, and the published format has no such tensor")
    if companions is None and source is not None:
        companions = source.folder
    _write(Path(folder), table, wanted, layout, leaves, source, None if companions is None else Path(companions))


def published_table(config: ModelConfig, format: str | None = None) -> tuple[str, dict[str, Any]]:
    """The model_type and the config.json of a model.

    The table is read again, and is taken only if it means the same model.

    Raises:
        ValueError: no architecture of that format has such a model; the message says what stands in the way of the nearest.
    """
    wanted, reasons, far = function_of(config), dict[str, list[str]](), dict[str, list[str]]()
    for name, architecture in ARCHITECTURES.items():
        if architecture.table is None or format not in (None, architecture.family):
            continue
        try:
            table = architecture.table(config)
            if table["model_type"] != name:
                continue
            read = function_of(model_of(architecture, Keys(table)))
        except ValueError as error:  # far from it: the differences of others say more
            far.setdefault(str(error), []).append(name)
            continue
        found = changes(wanted, read)
        if not found:
            return name, table
        reasons[name] = [
            f"{name} would have {key} {there!r}, this model has {here!r}" for key, (here, there) in found.items()
        ]
    which = "" if format is None else f" of {format}"
    if reasons:
        nearest = min(reasons.values(), key=len)
        said = list(dict.fromkeys(nearest))[:3]
    else:
        said = [f"{why} ({', '.join(names)})" for why, names in far.items()]
    raise ValueError(f"no published class{which} has such a model: {'; '.join(said)}")


def _leaves(model: LanguageModel) -> dict[str, Array]:
    state = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    leaves = {path_string(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}
    if not all(leaf.is_fully_addressable for leaf in leaves.values()):
        raise ValueError("model must lie on devices of this process alone, but it is spread over several")
    return leaves


def _write(
    folder: Path,
    table: Mapping[str, Any],
    wanted: Wanted,
    layout: Layout,
    leaves: Mapping[str, Array],
    source: Checkpoint | None,
    companions: Path | None,
) -> None:
    """Everything into a folder beside, which gets its name when it is complete."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f'"{folder}" is there already and not empty')
    draft = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        draft.mkdir(parents=True)
        (draft / CONFIG).write_text(json.dumps(table, indent=2) + "\n")
        if companions is not None:
            copy_companions(companions, draft)
        if source is not None:
            copy_code(source, draft)

        def data(name: str) -> Iterable[bytes]:
            if name in layout.targets:
                return _tensor_bytes(name, wanted[name][0], layout.targets[name], leaves)
            assert source is not None
            if name in source.heads:
                return _tensor_bytes(name, wanted[name][0], layout.targets[layout.embedding], leaves)
            return raw_bytes(source.tensors[name])

        _write_files(draft, wanted, data, source)
        if folder.is_dir():
            folder.rmdir()
        draft.replace(folder)
    except OSError as error:
        raise ValueError(f'"{folder}" cannot be written ({error.strerror})') from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _write_files(draft: Path, wanted: Wanted, data: Any, source: Checkpoint | None) -> None:
    """The tensors in files as they were, or of at most so many bytes."""
    files: list[list[str]] = [[]]
    if source is not None:
        by_file: dict[str, list[str]] = {}
        for name, tensor in sorted(source.tensors.items(), key=lambda pair: (pair[1].file, pair[1].place)):
            by_file.setdefault(tensor.file, []).append(name)
        files = list(by_file.values())
    else:
        room = LARGEST
        for name, (dtype, shape) in wanted.items():
            size = math.prod(shape) * item_size(dtype)
            if size > room and files[-1]:
                files.append([])
                room = LARGEST
            files[-1].append(name)
            room -= size
    if source is not None:
        names = list(by_file)
    elif len(files) == 1:
        names = [SINGLE]
    else:
        names = [f"model-{n + 1:05}-of-{len(files):05}.safetensors" for n in range(len(files))]
    for file, members in zip(names, files, strict=True):
        write_file(draft / file, {name: wanted[name] for name in members}, data)
    if source is not None and all(wanted[name][0] == tensor.dtype for name, tensor in source.tensors.items()):
        if (source.folder / INDEX).is_file():
            shutil.copyfile(source.folder / INDEX, draft / INDEX)
    elif names != [SINGLE]:
        total = sum(math.prod(shape) * item_size(dtype) for dtype, shape in wanted.values())
        index = {
            "metadata": {"total_size": total},
            "weight_map": {name: file for file, members in zip(names, files, strict=True) for name in sorted(members)},
        }
        (draft / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _tensor_bytes(name: str, dtype: str, target: Target, leaves: Mapping[str, Array]) -> Iterator[bytes]:
    """The bytes of a tensor, slab by slab.

    Raises:
        ValueError: rows that stand for several copies in the model are not equal in all of them.
    """
    copies = [piece for piece in target.pieces if piece.copy]
    rows_at = {piece.start: piece for piece in target.pieces if not piece.copy}
    for piece in copies:
        if not all(map(np.array_equal, _rows(rows_at[piece.start], leaves), _rows(piece, leaves))):
            raise ValueError(f"{name} stands for {piece.leaf}, whose repeated heads are no longer equal")
    for piece in target.pieces:
        if not piece.copy:
            for rows in _rows(piece, leaves):
                yield np.ascontiguousarray(rows.astype(DTYPES[dtype])).tobytes()


def _rows(piece: Any, leaves: Mapping[str, Array]) -> Iterator[np.ndarray]:
    """The rows of a piece as [count, rest]."""
    leaf = leaves[piece.leaf]
    inner = leaf.shape[len(piece.index) :]
    width = math.prod(inner) // (inner[0] if len(inner) == 1 or is_table(piece.leaf) else inner[-1])
    step = max(1, SLAB // (width * leaf.dtype.itemsize))
    for start in range(piece.column, piece.column + piece.count, step):
        stop = min(start + step, piece.column + piece.count)
        if len(inner) == 1 or is_table(piece.leaf):
            yield np.asarray(leaf[(*piece.index, slice(start, stop))]).reshape(stop - start, width)
        else:
            yield np.asarray(leaf[(*piece.index, ..., slice(start, stop))]).T
