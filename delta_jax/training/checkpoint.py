"""Checkpoints: asynchronous saves by Orbax, a digest of every file, and a restore that survives damage."""

import dataclasses
import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, EveryNSteps, LatestN

from delta_jax.config import differences, load_config, to_dict
from delta_jax.models import LanguageModel
from delta_jax.parallel import path_string
from delta_jax.training.config import CheckpointConfig, TrainConfig
from delta_jax.training.folder import DAMAGED, digest, kept_tokenizer, listing, make_way, set_aside
from delta_jax.training.processes import gather, is_first, is_lost, several, wait_for_all
from delta_jax.training.state import TrainState, abstract_model, merge_model

CHECKPOINTS = "checkpoints"
DIGESTS = "digests.json"
ITEMS = ("parameters", "optimizer", "data", "about")
EMA = "ema"
"""An item that only checkpoints with a moving average of the weights have."""


@dataclass(frozen=True, kw_only=True)
class Restored:
    """A checkpoint, read back.

    Attributes:
        state: the train state, on the mesh.
        data: the state of the data iterator.
    """

    state: TrainState
    data: Any


class Checkpoints:
    """The checkpoints of one run; a context manager that waits for the last save when it closes.

    Opening removes what a killed save left half-written. A checkpoint newer than the newest intact one is
    damaged: it is moved to the folder "damaged" beside the checkpoints, with a warning.

    Several processes open, save and restore together, in a folder that all see. Each makes and checks the digests of the
    files that it has written itself, the first one those of all other files; when a run is opened by another number of
    processes, the files are dealt out anew.

    Args:
        output: the run's folder; the checkpoints are in "checkpoints" below it.
        config: which checkpoints are kept.

    Raises:
        ValueError: there are checkpoints, and all of them are damaged.

    Examples:
        >>> from pathlib import Path
        >>> with Checkpoints(Path("new"), CheckpointConfig()) as checkpoints:
        ...     checkpoints.latest is None  # nothing is saved yet
        True
    """

    def __init__(self, output: Path, config: CheckpointConfig):
        self._folder = (output / CHECKPOINTS).absolute()
        if is_first():
            make_way(self._folder, folder=True).mkdir(parents=True, exist_ok=True)
        wait_for_all("the folder of checkpoints is there")
        self.latest = _set_damaged_aside(self._folder)
        self._saving = self._digested = -1
        self._barrier = ocp.multihost.get_barrier_sync_fn()
        keep = [LatestN(config.keep_last)]
        options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy(
                keep if config.keep_every is None else [*keep, EveryNSteps(config.keep_every)]
            ),
            cleanup_tmp_directories=True,
            async_options=ocp.options.AsyncOptions(
                barrier_sync_fn=self._digest_and_wait, post_finalization_callback=self._write_digests
            ),
        )
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if several() and error is not None and is_lost(error):
            return  # a save at work would wait for the process that is lost
        self._manager.close()

    def save(self, state: TrainState, data: Any, config: Any, **about: Any) -> None:
        """Copy the state off the devices and write it in the background; the arrays may be donated
        afterwards.

        Args:
            state: what is saved, under its step.
            data: JSON-able state of the data iterator, of the same moment.
            config: a dataclass, kept beside it, so that the checkpoint says what it is.
            about: JSON-able, whatever else the checkpoint should say.
        """
        self._manager.wait_until_finished()
        self._saving = int(state.step)
        table = {"config": to_dict(config), "arrays": _describe(state), **about}
        items: dict[str, Any] = {} if state.ema is None else {EMA: ocp.args.StandardSave(state.ema)}
        self._manager.save(
            self._saving,
            args=ocp.args.Composite(
                parameters=ocp.args.StandardSave(state.parameters),
                optimizer=ocp.args.StandardSave(state.optimizer),
                data=ocp.args.JsonSave(data),
                about=ocp.args.JsonSave(table),
                **items,
            ),
            force=True,
        )
        self.latest = self._saving

    def about(self) -> Mapping[str, Any]:
        """What the newest checkpoint says of itself: "config", "arrays" (path -> dtype and shape) and what else ``save``
        was given.

        Raises:
            ValueError: there is none.
        """
        if self.latest is None:
            raise ValueError(f"there is no checkpoint in {self._folder}")
        return _about(self._folder / str(self.latest))

    def restore(self, template: TrainState) -> Restored:
        """Read the newest checkpoint onto the template's shardings.

        Args:
            template: the train state as ShapeDtypeStructs with shardings; the mesh may differ from the saved
                one's.

        Returns:
            State and data iterator's state.

        Raises:
            ValueError: there is none, or its arrays are not the template's; the message says what differs.
        """
        unequal = differences(self.about()["arrays"], _describe(template))
        if unequal:
            raise ValueError(
                f"checkpoint {self.latest} in {self._folder} holds other arrays than this model and optimizer have, set "
                f"another output folder: {listing(unequal)}"
            )
        average: dict[str, Any] = {} if template.ema is None else {EMA: ocp.args.StandardRestore(template.ema)}
        items: Any = self._manager.restore(
            self.latest,
            args=ocp.args.Composite(
                parameters=ocp.args.StandardRestore(template.parameters),
                optimizer=ocp.args.StandardRestore(template.optimizer),
                data=ocp.args.JsonRestore(),
                **average,
            ),
        )
        step = jax.device_put(jax.numpy.asarray(self.latest, template.step.dtype), template.step.sharding)
        ema = items[EMA] if average else None
        state = TrainState(step=step, parameters=items.parameters, optimizer=items.optimizer, ema=ema)
        return Restored(state=state, data=items.data)

    def wait(self) -> None:
        """Return when the last save is on disk."""
        self._manager.wait_until_finished()

    def _digest_and_wait(self, *, key: str, timeout_ms: int) -> None:
        """Called by Orbax on each of several processes, of a save first when this one has written all its files."""
        if self._digested != self._saving:
            self._digested = self._saving
            for folder in self._unfinished():
                files = [path for path in _item_files(folder) if _writer(path) == jax.process_index()]
                own = folder / f"{Path(DIGESTS).stem}.{jax.process_index()}.json"
                _write(own, {str(path.relative_to(folder)): digest(path) for path in files})
        self._barrier(key=key, timeout_ms=timeout_ms)

    def _write_digests(self) -> None:
        """Called by Orbax when all files are written and before the folder gets its final name, on the first process."""
        for folder in self._unfinished():
            known: dict[str, str] = {}
            for part in folder.glob(f"{Path(DIGESTS).stem}.*.json"):
                known |= json.loads(part.read_bytes())
                part.unlink()
            names = {str(path.relative_to(folder)): path for path in _item_files(folder)}
            _write(folder / DIGESTS, {name: known.get(name) or digest(path) for name, path in names.items()})

    def _unfinished(self) -> list[Path]:
        """The folder of the save at work, until it has its final name."""
        return list(self._folder.glob(f"{self._saving}.orbax-checkpoint-tmp*"))


def restore_model(
    folder: str | Path, step: int | None = None, *, ema: bool = False
) -> tuple[TrainConfig, LanguageModel]:
    """Read the model of a checkpoint of a run, on the default device.

    Args:
        folder: the run's output folder.
        step: after how many optimizer steps; None is the newest intact checkpoint.
        ema: take the moving average of the weights (``TrainConfig.ema_decay``) in their place.

    Returns:
        The run's configuration, in which data.tokenizer is the run's own copy, and its model.

    Raises:
        ValueError: there is no checkpoint, or all are damaged; or there is none of that step, or it is; or it has no moving
            average; or the tokenizer is lost.

    Examples:
        >>> config, model = restore_model("run")  # made by the example of `train`
        >>> config.steps, model(jnp.array([[1, 2, 3]])).shape
        (2, (1, 3, 257))
    """
    checkpoint, table = find_checkpoint(folder, step)
    config = load_config(TrainConfig, table["config"])
    tokenizer = kept_tokenizer(Path(folder), config.data.tokenizer, table.get("tokenizer"))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=tokenizer))
    structure, parameters = abstract_model(config.model)
    unequal = differences(
        {key: value for key, value in table["arrays"].items() if key.startswith("parameters/")},
        _describe({"parameters": parameters}),
    )
    if unequal:
        raise ValueError(f"{checkpoint} does not fit this version: {listing(unequal)}")
    if ema and not (checkpoint / EMA).is_dir():
        raise ValueError(f"ema: {checkpoint} has no moving average of the weights: its run had no ema_decay")
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), parameters)
    return config, merge_model(structure, read_arrays(checkpoint / (EMA if ema else "parameters"), target))


def find_checkpoint(folder: str | Path, step: int | None = None) -> tuple[Path, Mapping[str, Any]]:
    """The folder of an intact checkpoint of a run, and what it says of itself, see ``Checkpoints.about``.

    Raises:
        ValueError: there is none, or none of that step, or it is damaged.
    """
    checkpoints = Path(folder).absolute() / CHECKPOINTS
    if not checkpoints.is_dir():
        raise ValueError(f'"{folder}" is not the output folder of a training run: it has no folder {CHECKPOINTS}')
    if step is None:
        step, damaged = _newest_intact(_steps(checkpoints), lambda step: _damage(checkpoints / str(step)))
        if step is None:
            raise ValueError(f'there is no checkpoint in "{checkpoints}"' + _reasons(damaged))
        if damaged:
            warnings.warn(f"using checkpoint {step} in {checkpoints}" + _reasons(damaged), stacklevel=3)
    else:
        there = _steps(checkpoints)
        if step not in there:
            kept = ", ".join(map(str, there)) or "none"
            raise ValueError(f'step: there is no checkpoint {step} in "{checkpoints}", only {kept}')
        if (damage := _damage(checkpoints / str(step))) is not None:
            raise ValueError(f'step: checkpoint {step} in "{checkpoints}" is damaged ({damage})')
    return checkpoints / str(step), _about(checkpoints / str(step))


def newest_about(folder: Path) -> Mapping[str, Any] | None:
    """What the newest intact checkpoint of a run says of itself; None where there is none."""
    checkpoints = folder.absolute() / CHECKPOINTS
    if not checkpoints.is_dir():
        return None
    step, _ = _newest_intact(_steps(checkpoints), lambda step: _damage(checkpoints / str(step)))
    return None if step is None else _about(checkpoints / str(step))


def read_arrays(item: Path, target: Any) -> Any:
    """An item of a checkpoint, read onto the dtypes and shardings of a tree of ShapeDtypeStructs."""
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(item, target)


def _describe(tree: Any) -> dict[str, str]:
    """Path of each array -> its dtype and shape."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {path_string(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}


def _about(checkpoint: Path) -> Mapping[str, Any]:
    table: Mapping[str, Any] = json.loads((checkpoint / "about" / "metadata").read_text())
    return table


def _set_damaged_aside(folder: Path) -> int | None:
    """Move damaged checkpoints away and return the newest intact step, None where there is no checkpoint."""
    step, damaged = _newest_intact(gather(_steps(folder))[0], lambda step: _damage_to_any(folder / str(step)))
    if damaged and step is None:
        raise ValueError(f"all checkpoints in {folder} are damaged" + _reasons(damaged))
    if damaged and is_first():
        aside = folder.parent / DAMAGED
        warnings.warn(
            f"continuing from checkpoint {step} in {folder}" + _reasons(damaged) + f"; moved to {aside}",
            stacklevel=4,
        )
        for name in damaged:
            set_aside(folder / str(name), folder.parent)
    wait_for_all("what is damaged is aside")
    return step


def _newest_intact(steps: Sequence[int], damage_of: Callable[[int], str | None]) -> tuple[int | None, dict[int, str]]:
    """The newest checkpoint with all files there and unchanged, and what is wrong with each newer one."""
    damaged: dict[int, str] = {}
    for step in reversed(steps):
        damage = damage_of(step)
        if damage is None:
            return step, damaged
        damaged[step] = damage
    return None, damaged


def _steps(folder: Path) -> list[int]:
    """The steps of the checkpoints in a folder, damaged or not, in order."""
    names = [path.name for path in folder.iterdir()]
    return sorted(int(name) for name in names if name.isdecimal() and name == str(int(name)))


def _damage_to_any(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, of which each process looks at a share of the files."""
    found = gather(_damage(checkpoint, jax.process_index(), jax.process_count()) if several() else _damage(checkpoint))
    return next((damage for damage in found if damage is not None), None)


def _damage(checkpoint: Path, share: int = 0, shares: int = 1) -> str | None:
    """What is wrong with a checkpoint, as far as one of some shares of its files tells."""
    try:
        digests = json.loads((checkpoint / DIGESTS).read_bytes())
    except FileNotFoundError:
        return f"{DIGESTS} is missing"
    except (ValueError, RecursionError, OSError):
        return f"{DIGESTS} is unreadable"
    if not isinstance(digests, dict) or {name.partition("/")[0] for name in digests} - {EMA} != set(ITEMS):
        return f"{DIGESTS} does not list the files of {', '.join(ITEMS)}"
    for name, written in digests.items():
        if (_writer(Path(name)) or 0) % shares != share:
            continue
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
        if digest(checkpoint / name) != written:
            return f"{name} is not what was written"
    return None


def _writer(path: Path) -> int | None:
    """Which process has written a file of a checkpoint; None where it is no single one's, or not said."""
    own = (re.fullmatch(r"ocdbt\.process_(\d+)", part) for part in path.parts)
    return next((int(match[1]) for match in own if match), None)


def _write(path: Path, digests: Mapping[str, str]) -> None:
    path.write_text(json.dumps(digests, indent=1))


def _reasons(damaged: Mapping[int, str]) -> str:
    return "".join(f"; checkpoint {step} is damaged ({reason})" for step, reason in damaged.items())


def _item_files(checkpoint: Path) -> list[Path]:
    """All that holds data; the files beside the items are Orbax's own, it rewrites them when it commits."""
    return sorted(path for path in checkpoint.glob("*/**/*") if path.is_file())
