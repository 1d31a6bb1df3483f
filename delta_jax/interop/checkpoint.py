"""A published checkpoint, opened: its keys understood and every tensor accounted for before a number is read."""

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from delta_jax.config import did_you_mean
from delta_jax.interop.architectures import ARCHITECTURES, INEXPRESSIBLE
from delta_jax.interop.architectures.common import Architecture, model_of
from delta_jax.interop.keys import Keys
from delta_jax.interop.layout import Layout, layout_of
from delta_jax.interop.safetensors import (
    DTYPES,
    INDEX,
    Tensor,
    is_file_name,
    raw_bytes,
    read_json,
    readable,
    tensors_of_file,
    tensors_of_folder,
    write_file,
)
from delta_jax.models import LanguageModel, ModelConfig
from delta_jax.parallel import path_string

__all__ = ["Checkpoint", "abstract_leaves", "expected_layout", "open_checkpoint"]

CONFIG = "config.json"
KEPT = "source"  # the folder of a run that says what it was imported from
DESCRIPTION = "tensors.json"
ASIDE = "aside.safetensors"
HEAD = "lm_head.weight"
# What belongs to a model beside its weights: its tokenizer, how it talks, and how it ends.
COMPANIONS = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
    *("vocab.json", "merges.txt", "tiktoken.model", "generation_config.json", "chat_template.jinja"),
    *("preprocessor_config.json", "video_preprocessor_config.json"),
)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What a folder holds.

    Attributes:
        folder: where it is.
        table: its config.json.
        architecture: of which it is one.
        model: the same as a configuration, in float32.
        tensors: all of its tensors, by name.
        layout: which of them are what of the model.
        aside: names of those that take no part in the text model's function.
        heads: names of those that repeat the embedding, where the model ties the two.

    Examples:
        >>> found = open_checkpoint("qwen3_5")
        >>> found.architecture.family, found.model.num_layers, found.tensors["model.norm.weight"].shape
        ('transformers', 4, (24,))
    """

    folder: Path
    table: Mapping[str, Any]
    architecture: Architecture
    model: ModelConfig
    tensors: Mapping[str, Tensor]
    layout: Layout
    aside: tuple[str, ...]
    heads: tuple[str, ...]


def open_checkpoint(source: str | Path, ignore_keys: Sequence[str] = ()) -> Checkpoint:
    """Opens a folder of safetensors files, or one file with a config.json beside it; reads headers only.

    Args:
        source: the folder or file; or a name on a hub, "owner/name", if huggingface_hub is installed and reaches it.
        ignore_keys: keys of config.json that are known to change nothing.

    Returns:
        The checkpoint.

    Raises:
        ValueError: a file is missing, damaged or of another kind, the architecture is not known, a key changes the function
            in a way that this library does not have, or a tensor is missing, left over or of another shape. The
            message names it.

    Examples:
        >>> found = open_checkpoint("qwen3_5")
        >>> found.table["model_type"], found.aside
        ('qwen3_5_text', ())
    """
    with readable(source):
        return _opened(_found(source), ignore_keys)


def _opened(path: Path, ignore_keys: Sequence[str]) -> Checkpoint:
    folder = path.parent if path.is_file() else path
    if not (folder / CONFIG).is_file():
        raise ValueError(f'"{folder}" holds no {CONFIG}')
    table = read_json(folder / CONFIG)
    if not isinstance(table, dict):
        raise ValueError(f"{folder / CONFIG} is no table")
    architecture = architecture_of(table)
    model = _understood(architecture, table, ignore_keys)
    tensors = _described(folder) if (folder / DESCRIPTION).is_file() else tensors_of_folder(path)
    there = {name: tensor.shape for name, tensor in tensors.items()}
    try:
        layout, pattern = expected_layout(architecture, model, table, there)
    except ValueError as error:
        raise ValueError(f'"{folder}": {error}') from error
    aside = tuple(name for name in tensors if name not in layout.targets and re.fullmatch(pattern, name))
    heads = tuple(
        name
        for name in tensors
        if model.tie_embeddings and name.endswith(HEAD) and name not in (*layout.targets, *aside)
    )
    _compare(tensors, layout, {*aside, *heads})
    return Checkpoint(
        folder=folder,
        table=table,
        architecture=architecture,
        model=model,
        tensors=tensors,
        layout=layout,
        aside=aside,
        heads=heads,
    )


def keep_description(checkpoint: Checkpoint, folder: Path) -> None:
    """Keeps of a checkpoint all but the model's weights: its keys and companions, how it is cut into tensors and files,
    and the tensors that are set aside. `open_checkpoint` opens the folder like the checkpoint itself."""
    folder.mkdir()
    (folder / CONFIG).write_bytes((checkpoint.folder / CONFIG).read_bytes())
    order = sorted(checkpoint.tensors.values(), key=lambda tensor: (tensor.file, tensor.place))
    rows = [[tensor.file, tensor.name, tensor.dtype, list(tensor.shape)] for tensor in order]
    (folder / DESCRIPTION).write_text(json.dumps(rows) + "\n")
    aside = {name: (tensor.dtype, tensor.shape) for name in checkpoint.aside for tensor in [checkpoint.tensors[name]]}
    write_file(folder / ASIDE, aside, lambda name: raw_bytes(checkpoint.tensors[name]))
    copy_companions(checkpoint.folder, folder)
    copy_code(checkpoint, folder)
    if (checkpoint.folder / INDEX).is_file():
        shutil.copyfile(checkpoint.folder / INDEX, folder / INDEX)


def copy_companions(source: Path, folder: Path) -> None:
    """Copies the files that belong to a model beside its weights."""
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def copy_code(checkpoint: Checkpoint, folder: Path) -> None:
    """Copies the modules of a class that comes with its checkpoint, as auto_map says; nothing of them is executed."""
    if checkpoint.table.get("auto_map"):
        for path in checkpoint.folder.glob("*.py"):
            shutil.copyfile(path, folder / path.name)


def _described(folder: Path) -> dict[str, Tensor]:
    """The tensors of such a folder; the numbers of those that are not set aside are elsewhere."""
    here, found, rows = tensors_of_file(folder / ASIDE), {}, read_json(folder / DESCRIPTION)
    if not isinstance(rows, list) or not all(map(_is_description, rows)):
        raise ValueError(
            f"{folder / DESCRIPTION} does not describe tensors: wanted rows of file, name, dtype and shape"
        )
    for place, (file, name, dtype, shape) in enumerate(rows):
        path, begin = (here[name].path, here[name].begin) if name in here else (folder / DESCRIPTION, -1)
        found[name] = Tensor(name, dtype, tuple(shape), path, begin, file, place)
    return found


def _is_description(row: Any) -> bool:
    """Whether it is [file, name, dtype, shape] of a tensor, the file a name in the same folder."""
    if not isinstance(row, list) or len(row) != 4 or not all(isinstance(entry, str) for entry in row[:3]):
        return False
    sizes = isinstance(row[3], list) and all(type(size) is int and size > 0 for size in row[3])
    return sizes and is_file_name(row[0])


def architecture_of(table: Mapping[str, Any]) -> Architecture:
    """The architecture that a config.json names.

    Raises:
        ValueError: it is not known, or known and not expressible; then the message says why.
    """
    kind = table.get("model_type")
    if isinstance(kind, str) and kind in INEXPRESSIBLE:
        raise ValueError(f"{CONFIG}: model_type is {kind!r}, which cannot be read: {INEXPRESSIBLE[kind]}")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        hint = did_you_mean(str(kind), ARCHITECTURES)
        raise ValueError(f"{CONFIG}: model_type is {kind!r}{hint}; known are {', '.join(sorted(ARCHITECTURES))}")
    return ARCHITECTURES[kind]


def expected_layout(
    architecture: Architecture,
    model: ModelConfig,
    table: Mapping[str, Any],
    there: Mapping[str, tuple[int, ...]] | None,
) -> tuple[Layout, str]:
    """The tensors that hold a model, and the pattern of those that take no part in it.

    Raises:
        ValueError: a tensor is not there, or has another shape.
    """
    found = architecture.tensors(model, Keys(table), there)
    shapes = {path: leaf.shape for path, leaf in abstract_leaves(model).items()}
    return layout_of(model, shapes, found.outer, found.block, there), found.aside


def abstract_leaves(model: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """The parameters of a model by their paths; nothing is allocated."""
    state = nnx.state(nnx.eval_shape(lambda: LanguageModel(model, rngs=nnx.Rngs(0))), nnx.Param)
    return {path_string(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(state))}


def _found(source: str | Path) -> Path:
    path = Path(source)
    if path.exists():
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        raise ValueError(f'there is no folder or file "{source}"')
    try:
        import huggingface_hub  # type: ignore[import-not-found, unused-ignore]
    except ModuleNotFoundError as error:
        raise ValueError(
            f'there is no folder or file "{source}"; if it is the name of a model on a hub, fetching it needs '
            "huggingface_hub, which is not installed"
        ) from error
    patterns = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py"]
    try:
        return Path(huggingface_hub.snapshot_download(str(source), allow_patterns=patterns))
    except Exception as error:  # whatever the network and its libraries raise
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f'"{source}" is no folder or file, and the hub did not give it: {reason}') from error


def _understood(architecture: Architecture, table: Mapping[str, Any], ignore_keys: Sequence[str]) -> ModelConfig:
    if table.get("quantization_config") is not None and "quantization_config" not in ignore_keys:
        raise ValueError(f"{CONFIG}: quantization_config is set, and quantised weights are not read here")
    kept = {name: value for name, value in table.items() if name not in ignore_keys}
    try:
        model = model_of(architecture, Keys(kept))
    except ValueError as error:
        said = str(error)
        raise ValueError(said if said.startswith(CONFIG) else f"{CONFIG}: {said}") from error
    return replace(model, dtype="float32", param_dtype="float32")


def _compare(tensors: Mapping[str, Tensor], layout: Layout, others: set[str]) -> None:
    for name in layout.targets:
        if tensors[name].dtype not in DTYPES:
            known = ", ".join(DTYPES)
            raise ValueError(
                f"{tensors[name].path}: the tensor {name} is of the dtype {tensors[name].dtype}; known are {known}"
            )
    left = [name for name in tensors if name not in layout.targets and name not in others]
    if left:
        more = f", and {len(left) - 1} more" if len(left) > 1 else ""
        raise ValueError(
            f"{tensors[left[0]].path}: the tensor {left[0]}{more} belongs to nothing that {CONFIG} describes"
        )
