"""What a run begins with: the weights, the model and the tokenizer of another run, or of a Hugging Face folder."""

import dataclasses
import functools
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from delta_jax.config import differences, to_dict
from delta_jax.models import LanguageModel, ModelConfig
from delta_jax.parallel import path_string
from delta_jax.training.checkpoint import CHECKPOINTS, find_checkpoint, newest_about, read_arrays
from delta_jax.training.config import TrainConfig
from delta_jax.training.folder import TOKENIZER, kept_tokenizer, listing
from delta_jax.training.state import split_model

_REQUIRED = tuple(
    field.name
    for field in dataclasses.fields(ModelConfig)
    if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
)


@dataclass(frozen=True, kw_only=True)
class _Start:
    """What ``initial`` says before any weight is read.

    Attributes:
        model: its model's table.
        tokenizer: what ``data.tokenizer`` should name; None where there is none.
    """

    model: Mapping[str, Any]
    tokenizer: str | None


def completed(table: Mapping[str, Any]) -> Mapping[str, Any]:
    """The table of a run with what ``initial`` supplies: the keys of the model that it leaves out, and the tokenizer.

    A model that has all the keys it must have is taken as it is. Where the run has begun already, the model and the
    tokenizer are its own, and ``initial`` is not read.

    Raises:
        ValueError: ``initial`` names neither a run nor a Hugging Face folder, or cannot be read.
    """
    initial, model, data = table.get("initial"), table.get("model", {}), table.get("data", {})
    if not isinstance(initial, str) or not isinstance(model, Mapping) or not isinstance(data, Mapping):
        return table  # whoever builds it says what is wrong with them
    whole = all(name in model for name in _REQUIRED)
    if whole and "tokenizer" in data:
        return table
    start = _begun(str(table.get("output", TrainConfig.output)), initial) or _start(initial)
    if not whole:
        model = _merged(start.model, model)
    if "tokenizer" not in data and start.tokenizer is not None:
        data = {**data, "tokenizer": start.tokenizer}
    return {**table, "model": model, "data": data}


def initial_parameters(config: TrainConfig, target: Any) -> tuple[Any, list[str]]:
    """Read the weights that a run begins with.

    Args:
        config: the run, whose ``initial`` names them.
        target: the parameters as ShapeDtypeStructs with shardings, onto which they are read.

    Returns:
        The parameters, and a line for each key in which the model is another than theirs although they fit.

    Raises:
        ValueError: there are none, or they are not those of the model; the message says what differs.
    """
    assert config.initial is not None
    folder, step = _run_of(config.initial)
    if folder is not None:
        checkpoint, table = find_checkpoint(folder, step)
        model = table["config"]["model"]
        there = {
            key.removeprefix("parameters/"): "[" + kind.partition("[")[2]
            for key, kind in table["arrays"].items()
            if key.startswith("parameters/")
        }
        changed = _check(config, model, there, target)
        return read_arrays(checkpoint / "parameters", target), changed
    pretrained = _pretrained(_hugging_face(config.initial))
    _, parameters = split_model(pretrained)
    changed = _check(config, to_dict(pretrained.config), _shapes(parameters), target)
    _pretrained.cache_clear()

    def place(leaf: Any, wanted: Any) -> jax.Array:
        array = np.asarray(leaf)
        return jax.make_array_from_callback(
            wanted.shape, wanted.sharding, lambda index: array[index].astype(wanted.dtype)
        )

    return jax.tree.map(place, parameters, target), changed


def _check(config: TrainConfig, model: Mapping[str, Any], there: Mapping[str, str], target: Any) -> list[str]:
    """Whether weights fit a model, and in what theirs is another."""
    changed = [f"model.{line}" for line in differences(model, to_dict(config.model))]
    unequal = differences(there, _shapes(target))
    if unequal:
        raise ValueError(
            f"the model does not fit the weights of initial, {config.initial}: {listing(changed or unequal)}"
        )
    return changed


def _shapes(parameters: Any) -> dict[str, str]:
    return {path_string(path): str(list(leaf.shape)) for path, leaf in jax.tree_util.tree_leaves_with_path(parameters)}


def _begun(output: str, initial: str) -> _Start | None:
    """What the run in the output folder has, if it has begun and with the same weights."""
    about = newest_about(Path(output))
    if about is None or about["config"].get("initial") != initial:
        return None
    tokenizer = about["config"]["data"]["tokenizer"]
    if not Path(tokenizer).is_file():
        tokenizer = kept_tokenizer(Path(output), tokenizer, about.get("tokenizer"))
    return _Start(model=about["config"]["model"], tokenizer=tokenizer)


def _start(initial: str) -> _Start:
    folder, step = _run_of(initial)
    if folder is not None:
        _, about = find_checkpoint(folder, step)
        tokenizer = kept_tokenizer(folder, about["config"]["data"]["tokenizer"], about.get("tokenizer"))
        return _Start(model=about["config"]["model"], tokenizer=tokenizer)
    hugging_face = _hugging_face(initial)
    if not (hugging_face / TOKENIZER).is_file():
        raise ValueError(
            f"initial: {initial} has no {TOKENIZER}: name the tokenizer of these weights with data.tokenizer"
        )
    return _Start(model=to_dict(_pretrained(hugging_face).config), tokenizer=str(hugging_face / TOKENIZER))


def _run_of(initial: str) -> tuple[Path | None, int | None]:
    """The run's folder and the step, None for the newest; no folder where no run is named.

    A run is named by its folder or by that of one of its checkpoints.
    """
    folder = Path(initial)
    if folder.parent.name == CHECKPOINTS and folder.name.isdecimal():
        return folder.parent.parent, int(folder.name)
    return (folder, None) if (folder / CHECKPOINTS).is_dir() else (None, None)


def _hugging_face(initial: str) -> Path:
    folder = Path(initial)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"initial: {initial} is neither the output folder of a training run, which has a folder {CHECKPOINTS}, nor a "
            "Hugging Face folder, which has a config.json"
        )
    return folder


@functools.lru_cache(maxsize=1)
def _pretrained(folder: Path) -> LanguageModel:
    """The model in a Hugging Face folder; kept from when its configuration is read until its weights are."""
    model: LanguageModel = importlib.import_module("delta_jax.interop").load_pretrained(folder, param_dtype="float32")
    return model


def _merged(base: Any, changes: Any) -> Any:
    """A table with the keys of another in place of its own; in arrays, keys that are numbers reach the entries."""
    if isinstance(base, Mapping) and isinstance(changes, Mapping):
        return {**base, **{key: _merged(base.get(key), value) for key, value in changes.items()}}
    if isinstance(base, list | tuple) and isinstance(changes, Mapping):
        entries = list(base)
        for key, value in changes.items():
            if not key.isdecimal() or int(key) >= len(entries):
                raise ValueError(f"model: there is no entry {key}, the array has {len(entries)} (numbered from 0)")
            entries[int(key)] = _merged(entries[int(key)], value)
        return entries
    return changes
