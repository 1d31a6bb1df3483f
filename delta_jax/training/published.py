"""Published checkpoints as run folders, and back: what is imported is evaluated, continued and fine-tuned like any run."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import jax.numpy as jnp

from delta_jax.config import to_dict
from delta_jax.data import DataConfig, load_tokenizer
from delta_jax.interop import load_pretrained, save_pretrained
from delta_jax.interop.checkpoint import KEPT, Checkpoint, copy_companions, keep_description, open_checkpoint
from delta_jax.models import LanguageModel
from delta_jax.training.checkpoint import Checkpoints, restore_model
from delta_jax.training.config import CheckpointConfig, TrainConfig
from delta_jax.training.folder import CONFIG, TOKENIZER, keep_tokenizer, open_folder
from delta_jax.training.state import TrainState, split_model

__all__ = ["export_run", "import_run"]

LONGEST = 2048  # tokens of the rows by which an imported run is evaluated, unless it is told otherwise


def import_run(
    source: str | Path, output: str | Path, *, dtype: str = "float32", ignore_keys: Sequence[str] = ()
) -> Checkpoint:
    """Makes a run folder of a published checkpoint: its weights as the checkpoint of step 0, and its tokenizer.

    What the export needs to write the same files again is kept in the folder "source" of the run.

    Args:
        source: as in `load_pretrained`.
        output: the run's folder; it must be new or empty.
        dtype: of the computation and the parameters.
        ignore_keys: as in `load_pretrained`.

    Returns:
        What was found.

    Raises:
        ValueError: see `load_pretrained`; or the folder holds something or cannot be written, or the tokenizer has more ids
            than the model. Then nothing is written.

    Examples:
        >>> found = import_run("qwen3_5", "imported")
        >>> config, model = restore_model("imported")
        >>> config.model.hidden_size, found.aside
        (24, ())
    """
    folder = Path(output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f'output: "{folder}" is there already and not empty')
    checkpoint = open_checkpoint(source, ignore_keys)
    model = load_pretrained(
        checkpoint.folder if Path(source).is_dir() else source, dtype=dtype, ignore_keys=ignore_keys
    )
    tokenizer = str(checkpoint.folder / TOKENIZER) if (checkpoint.folder / TOKENIZER).is_file() else "bytes"
    ids = load_tokenizer(tokenizer).vocab_size
    if tokenizer != "bytes" and ids > model.config.vocab_size:
        raise ValueError(
            f"{tokenizer} has {ids} ids, but vocab_size in {CONFIG} is {model.config.vocab_size}: it is of another model"
        )
    try:
        open_folder(str(folder))
        _fill(folder, checkpoint, model, has_tokenizer=tokenizer != "bytes")
    except BaseException as error:  # whatever stopped it, half a run helps nobody
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise ValueError(f'output: "{folder}" cannot be written ({error.strerror or error})') from error
        raise
    return checkpoint


def _fill(folder: Path, checkpoint: Checkpoint, model: LanguageModel, *, has_tokenizer: bool) -> None:
    """Writes what a run's folder holds."""
    copy_companions(checkpoint.folder, folder)
    keep_description(checkpoint, folder / KEPT)
    longest = checkpoint.table.get("max_position_embeddings") or checkpoint.table.get("model_max_length")
    config = TrainConfig(
        model=model.config,
        data=DataConfig(tokenizer=str(folder / TOKENIZER) if has_tokenizer else "bytes"),
        steps=1,
        batch_size=8,
        sequence_length=min(LONGEST, longest) if type(longest) is int and longest > 0 else LONGEST,
        output=str(folder),
    )
    (folder / CONFIG).write_text(json.dumps(to_dict(config), indent=1) + "\n")
    digest = keep_tokenizer(folder, config.data.tokenizer)
    _, parameters = split_model(model)
    # No optimizer has seen these weights, and its moments would take twice their room.
    state = TrainState(
        step=jnp.zeros((), jnp.int32), parameters=parameters, optimizer={"none": jnp.zeros((), jnp.int32)}
    )
    with Checkpoints(folder, CheckpointConfig()) as checkpoints:
        checkpoints.save(state, {}, config, tokenizer=digest)


def export_run(
    run: str | Path,
    output: str | Path,
    *,
    format: Literal["transformers", "fla"] | None = None,
    step: int | None = None,
    dtype: str | None = None,
    ema: bool = False,
) -> str:
    """Writes the model of a run as a published checkpoint.

    Args:
        run: the run's folder.
        output: where it goes; there must not be anything yet.
        format: as in `save_pretrained`; with one given, and for runs that began here, the classes' own layout is written,
            else that of the checkpoint which the run was imported from.
        step: the checkpoint; None is the newest.
        dtype: as in `save_pretrained`.
        ema: the moving average of the weights in place of the weights.

    Returns:
        The model_type that was written.

    Raises:
        ValueError: see `save_pretrained` and `restore_model`.

    Examples:
        >>> _ = import_run("qwen3_5", "to_export")
        >>> export_run("to_export", "exported")
        'qwen3_5_text'
    """
    config, model = restore_model(run, step, ema=ema)
    kept = Path(run) / KEPT
    if kept.is_dir() and format is None:
        save_pretrained(model, output, like=kept, dtype=dtype)
    else:
        save_pretrained(
            model, output, format=format, dtype=dtype, companions=run, max_position_embeddings=config.sequence_length
        )
    written: str = json.loads((Path(output) / CONFIG).read_text())["model_type"]
    return written
