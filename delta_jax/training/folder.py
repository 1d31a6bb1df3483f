"""The files of a run beside its checkpoints: what is not as it was written is set aside, and the tokenizer is kept."""

import hashlib
import os
import shutil
import socket
import warnings
from collections.abc import Sequence
from pathlib import Path

from delta_jax.interop import COMPANIONS
from delta_jax.training.processes import is_first

CONFIG = "config.json"
CURVE = "curve.png"
DAMAGED = "damaged"
TOKENIZER = "tokenizer.json"


def open_folder(path: str) -> Path:
    """The output folder of a run, made if need be.

    Raises:
        ValueError: it cannot be written.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{socket.gethostname()}-{os.getpid()}"  # every process asks, on its own host
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f'output: the folder "{path}" cannot be written ({error.strerror})') from error
    return folder


def set_aside(path: Path, output: Path, *, copy: bool = False) -> Path:
    """Move (or copy) what lies at a path to the folder "damaged" of the run, beside what was set aside before.

    Returns:
        Where it is now.
    """
    folder = output / DAMAGED
    if folder.exists() and not folder.is_dir():
        raise ValueError(
            f"{folder} is in the way: damaged files are set aside into a folder of that name, move the file"
        )
    folder.mkdir(exist_ok=True)
    aside, count = folder / path.name, 0
    while aside.exists():
        count += 1
        aside = folder / f"{path.name}.{count}"
    if copy:
        shutil.copyfile(path, aside)
    else:
        shutil.move(path, aside)
    return aside


def make_way(path: Path, *, folder: bool = False) -> Path:
    """Returns the path of a run's file (or folder); what is there and is no file (no folder) is set aside, with a
    warning."""
    if path.exists() and (not path.is_dir() if folder else not path.is_file()):
        wanted = "a folder" if folder else "a file"
        aside = set_aside(path, path.parent)
        warnings.warn(f"{path} is not {wanted}: it was moved to {aside} and is written anew", stacklevel=3)
    return path


def listing(lines: Sequence[str], most: int = 4) -> str:
    """The first lines, and how many more there are, as one line."""
    rest = len(lines) - most
    return "; ".join(lines[:most]) + (f"; and {rest} more" if rest > 0 else "")


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def keep_tokenizer(output: Path, tokenizer: str) -> str | None:
    """Copy a tokenizer.json into the run, so that what was trained can be read wherever the run is moved.

    Its chat template and whatever else belongs to it and lies beside it come along.

    Args:
        output: the run's folder.
        tokenizer: "bytes", or the path of a tokenizer.json.

    Returns:
        The copy's digest, which checkpoints remember; None for "bytes", which needs no copy.
    """
    if tokenizer == "bytes":
        return None
    for name in COMPANIONS:
        if (beside := Path(tokenizer).parent / name).is_file():
            _keep(beside, output / name)
    return _keep(Path(tokenizer), output / TOKENIZER)


def _keep(original: Path, copy: Path) -> str:
    """Copy a file into the run, unless it is there; its digest. Of several processes the first one copies."""
    wanted = digest(original)
    if is_first() and not (make_way(copy).is_file() and digest(copy) == wanted):
        if copy.is_file():
            aside = set_aside(copy, copy.parent)
            warnings.warn(f"{copy} is not {original}: it was moved to {aside} and copied anew", stacklevel=4)
        draft = make_way(copy.with_suffix(".tmp"))
        shutil.copyfile(original, draft)
        draft.replace(copy)
    return wanted


def kept_tokenizer(output: Path, tokenizer: str, wanted: str | None) -> str:
    """The tokenizer that a run was trained with.

    Args:
        output: the run's folder.
        tokenizer: what its configuration names.
        wanted: the digest that its checkpoint remembers; None where the checkpoint is older than that.

    Returns:
        "bytes", or the path of a tokenizer.json: the run's own copy if it is whole, else, with a warning, the file
        that the configuration names.

    Raises:
        ValueError: the copy is missing or was changed, and the file that the configuration names is another one.
    """
    if tokenizer == "bytes":
        return tokenizer
    copy = output / TOKENIZER
    if wanted is None:
        warnings.warn(
            f"{output} keeps no tokenizer of its own, an older version trained it: using {tokenizer}, which may have "
            "changed since",
            stacklevel=3,
        )
        return tokenizer
    if copy.is_file() and digest(copy) == wanted:
        return str(copy)
    fault = "is missing" if not copy.exists() else "is not what the run was trained with"
    if not (Path(tokenizer).is_file() and digest(Path(tokenizer)) == wanted):
        raise ValueError(f"{copy} {fault}, and neither is {tokenizer}: put the tokenizer of the run back there")
    warnings.warn(f"{copy} {fault}: using {tokenizer}, which is", stacklevel=3)
    return tokenizer
