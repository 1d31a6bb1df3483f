"""Whether a run may go on from a checkpoint: what must be as it was, and what changes from here on."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from delta_jax.config import changes, load_config, to_dict
from delta_jax.data import differences
from delta_jax.training.config import TrainConfig
from delta_jax.training.folder import listing, make_way

FAULT = "data_fault.json"
"""Which fault of the data stopped the run after which step: whoever mends it changes the data."""

# Keys that a resumed run may change; every other is bound to the checkpoint. Which text lies at the corpus's path, and what
# the tokenizer is, the fingerprint of the data tells.
FREE = re.compile(
    r"(steps|gradient_accumulation|output|log_every|evaluate_every|evaluation_batches|changed_data|ema_decay"
    r"|(mesh|checkpoint|optimizer)\..*"
    r"|data\.(path|tokenizer|on_error)"
    r"|model\.(remat(_save|_offload)?|dtype|experts\.balance_rate|(pattern|layer_overrides)\.\d+\.(implementation|chunk_size)))"
)
CONTENT = ("data.path", "data.tokenizer")


def note_fault(output: Path, step: int, fault: str) -> None:
    """Remember in the run's folder that a fault of the data stopped it after a step."""
    make_way(output / FAULT).write_text(json.dumps({"step": step, "fault": fault}) + "\n")


def resumption(
    step: int, about: Mapping[str, Any], config: TrainConfig, data: Mapping[str, Any], output: Path
) -> list[str]:
    """Check that a run may go on from a checkpoint.

    Args:
        step: of the checkpoint.
        about: what it says of itself: "config" and, unless it is older than that, "fingerprint".
        config: of the run that resumes.
        data: the fingerprint of its data.
        output: the run's folder.

    Returns:
        Sentences about what changes from here on.

    Raises:
        ValueError: something is not as it was and has to be; the message names it with both values.
    """
    where = f"checkpoint {step} in {output}"
    changed = changes(_table(about["config"], where), to_dict(config))
    changed.pop("changed_data", None)
    allowed = config.changed_data == "allow"
    known: Mapping[str, Any] | None = about.get("fingerprint")
    unknown = CONTENT if known is None and not allowed else ()
    bound = [
        f"{key}: {old!r} there, {new!r} here"
        for key, (old, new) in changed.items()
        if key in unknown or not FREE.fullmatch(key)
    ]
    if bound:
        raise ValueError(f"{where} is of another run, set another output folder: {listing(bound)}")
    if config.steps < step:
        raise ValueError(f"steps is {config.steps}, but {where} is past it: nothing is left to train")
    said = []
    if changed:
        pairs = ", ".join(f"{key} {_plain(old)} -> {_plain(new)}" for key, (old, new) in changed.items())
        said.append(f"from here on: {pairs}")
    if known is None:
        said.append("the checkpoint is older than fingerprints of the data: the corpus is taken to be the one it was")
    elif unequal := differences(dict(known), dict(data)):
        said.append(_changed_data(where, unequal, allowed, _fault(output, step)))
    return said


def _changed_data(where: str, unequal: list[str], allowed: bool, fault: str | None) -> str:
    what = listing([sentence.rstrip(".") for sentence in unequal])
    meaning = "the place in the data is kept, so that documents may be read twice or not at all"
    if fault is not None:
        return f"the data has changed since the run stopped ({fault.rstrip('.')}): {what}; {meaning}"
    if allowed:
        return f"the data has changed, as changed_data=allow lets it: {what}; {meaning}"
    raise ValueError(
        f"the data is not what {where} was trained on: {what}; put it back, set another output folder, or go on with "
        f"changed_data=allow: {meaning}"
    )


def _fault(output: Path, step: int) -> str | None:
    """The fault of the data that stopped the run after this step, if one did."""
    try:
        note = json.loads((output / FAULT).read_bytes())
        return str(note["fault"]) if note["step"] == step else None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None  # no such file, or none that says anything: then no fault is known


def _table(saved: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A saved configuration as this version writes it: with the defaults of keys that it did not know."""
    try:
        return to_dict(load_config(TrainConfig, saved))
    except ValueError as error:
        raise ValueError(f"{where} has a configuration that this version cannot read: {error}") from error


def _plain(value: Any) -> str:
    return "null" if value is None else repr(value) if isinstance(value, str) else str(value)
