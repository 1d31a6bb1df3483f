"""What a run begins with: the weights, the model and the tokenizer of another run, or of a Hugging Face folder."""

import dataclasses
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from delta_jax.config import differences, to_dict
from delta_jax.interop import load_pretrained, open_checkpoint
from delta_jax.interop.checkpoint import KEPT, keep_description
from delta_jax.models import ModelConfig
from delta_jax.parallel import path_string
from delta_jax.training.checkpoint import CHECKPOINTS, find_checkpoint, newest_about, read_arrays
from delta_jax.training.config import TrainConfig
from delta_jax.training.folder import TOKENIZER, kept_tokenizer, listing
from delta_jax.training.state import abstract_model, split_model

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
    if "tokenizer" not in data:
        if start.tokenizer is None:
            raise ValueError(
                f"initial: {initial} has no {TOKENIZER}: name the tokenizer of these weights with data.tokenizer"
            )
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
    published = _hugging_face(config.initial)
    model = _published_config(published)
    changed = _check(config, to_dict(model), _shapes(abstract_model(model)[1]), target)
    mesh = jax.tree.leaves(target)[0].sharding.mesh
    dtypes = {"dtype": config.model.dtype, "param_dtype": config.model.param_dtype}
    _, parameters = split_model(load_pretrained(published, mesh=mesh, **dtypes))
    return jax.tree.map(lambda leaf, wanted: jax.device_put(leaf, wanted.sharding), parameters, target), changed


def keep_origin(initial: str, output: Path) -> None:
    """Keep what an export needs to write the weights' published form again, if they have one, in the run's folder."""
    kept = output / KEPT
    if jax.process_index() != 0 or kept.exists():
        return
    folder, _ = _run_of(initial)
    if folder is None:
        keep_description(open_checkpoint(_hugging_face(initial)), kept)
    elif (folder / KEPT).is_dir():
        shutil.copytree(folder / KEPT, kept)


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
    beside = hugging_face / TOKENIZER
    return _Start(model=to_dict(_published_config(hugging_face)), tokenizer=str(beside) if beside.is_file() else None)


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


def _published_config(folder: Path) -> ModelConfig:
    """The model in a Hugging Face folder, of which no weight is read."""
    return open_checkpoint(folder).model


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
