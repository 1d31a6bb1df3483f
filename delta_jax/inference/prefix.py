"""What a model has read, as a file: a long prefix is read once and continued as often as wanted."""

import hashlib
import io
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, UInt32

from delta_jax.config import differences, to_dict
from delta_jax.inference.reading import Reading, check_reading
from delta_jax.models import LanguageModel

__all__ = ["load_prefix", "model_fingerprint", "save_prefix"]

_FORMAT = "delta_jax prefix 1"
_ABOUT = "about.json"


def save_prefix(path: str | Path, model: LanguageModel, reading: Reading) -> None:
    """Writes what a model has read to a file: its state, of the same size however much that was, and the logits.

    Attention without a window keeps every token, and so does the file. It is a ZIP of the arrays' bytes and of a JSON that
    describes them and the model; nothing in it is ever run. What was there before is replaced once all is written.

    Args:
        path: of the file.
        model: who read.
        reading: from `read_prompts`, one row.

    Raises:
        ValueError: the reading has several rows or is another model's.
        OSError: the file cannot be written.

    Examples:
        >>> mixer = MixerSpec(mixer="delta_net", options=(("num_heads", 2),))
        >>> config = ModelConfig(vocab_size=11, hidden_size=8, num_layers=1, pattern=(mixer,), intermediate_size=0)
        >>> model = LanguageModel(config, rngs=nnx.Rngs(0))
        >>> save_prefix("prefix", model, read_prompts(model, [[1, 2, 3]]))
        >>> load_prefix("prefix", model).lengths.tolist()  # for generate(model, prompts, prefix=...)
        [3]
    """
    check_reading(model, reading, "reading")
    if len(reading.lengths) != 1:
        raise ValueError(f"reading must have one row to be saved, got {len(reading.lengths)}; take_rows takes one")
    arrays = {name: np.asarray(x) for name, x in _named((reading.logits, reading.cache, reading.seen)).items()}
    about = {
        "format": _FORMAT,
        "tokens": int(reading.lengths[0]),
        "room": reading.room,
        "arrays": {name: _kind(x) for name, x in arrays.items()},
        **_identity(model),
    }
    path = Path(path)
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with zipfile.ZipFile(draft, "w", zipfile.ZIP_STORED) as file:
            file.writestr(_ABOUT, json.dumps(about, indent=1))
            for name, x in arrays.items():
                with file.open(name, "w", force_zip64=True) as entry:
                    entry.write(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def load_prefix(path: str | Path, model: LanguageModel) -> Reading:
    """What a model has read, from a file of `save_prefix`: to be continued as `prefix` of `generate`.

    Args:
        path: of the file.
        model: the model that has read it: one of another configuration or with other weights is refused.

    Returns:
        One row. What follows it is what follows the prefix itself, bit for bit where the prefix was given as a reading, and
        within float32 rounding where it was given as part of the prompt.

    Raises:
        ValueError: there is no such file, it is damaged or no saved prefix, or another model made it.

    Examples:
        >>> mixer = MixerSpec(mixer="delta_net", options=(("num_heads", 2),))
        >>> config = ModelConfig(vocab_size=11, hidden_size=8, num_layers=1, pattern=(mixer,), intermediate_size=0)
        >>> model = LanguageModel(config, rngs=nnx.Rngs(0))
        >>> load_prefix("nowhere", model)  # the example of `save_prefix` reads one that is there
        Traceback (most recent call last):
        ValueError: prefix: nowhere cannot be read (No such file or directory)
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"prefix: {path} cannot be read ({error.strerror})") from None
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as file:
            about = json.loads(file.read(_ABOUT))
            if about["format"] != _FORMAT:
                raise ValueError(f"its format is {about['format']!r}")
            found = {name: (kind, file.read(name)) for name, kind in about["arrays"].items()}
            tokens, room, config, weights = (about[key] for key in ("tokens", "room", "config", "weights"))
            if not all(isinstance(size, int) and size > 0 for size in (tokens, room)):
                raise ValueError("its sizes are no sizes")
    except Exception as error:  # whatever else the bytes are, they are no file of ours
        if not data.startswith(b"PK"):
            raise ValueError(f"prefix: {path} is no prefix that was saved") from None
        raise ValueError(f"prefix: {path} is damaged or no prefix that was saved: {error}") from None
    here = _identity(model)
    if config != here["config"]:
        unequal = differences(config, here["config"]) if isinstance(config, dict) else []
        raise ValueError(f"prefix: {path} was made by another model: {'; '.join(unequal[:4])}")
    if weights != here["weights"]:
        raise ValueError(f"prefix: {path} was made by a model with other weights")
    like = _like(model, room)
    named = _named(like)
    wanted = {name: _kind(x) for name, x in named.items()}
    sizes = {name: x.size * x.dtype.itemsize for name, x in named.items()}
    if {name: kind for name, (kind, _) in found.items()} != wanted or any(
        len(content) != sizes[name] for name, (_, content) in found.items()
    ):
        raise ValueError(f"prefix: {path} is damaged: its arrays are not those of the model")
    leaves = [jnp.asarray(np.ndarray(x.shape, x.dtype, found[name][1])) for name, x in named.items()]
    logits, cache, seen = jax.tree.unflatten(jax.tree.structure(like), leaves)
    return Reading(logits, cache, seen, np.asarray([tokens], np.int64), room)


def model_fingerprint(model: LanguageModel) -> str:
    """A hexadecimal number that tells a model's configuration and weights from any other's."""
    return hashlib.sha256(json.dumps(_identity(model), sort_keys=True).encode()).hexdigest()


def _identity(model: LanguageModel) -> dict[str, Any]:
    """The configuration, as JSON keeps it, and a number for the weights."""
    paths, leaves = zip(*jax.tree_util.tree_leaves_with_path(nnx.state(model)), strict=True)
    names = [f"{jax.tree_util.keystr(path)} {x.dtype} {x.shape}" for path, x in zip(paths, leaves, strict=True)]
    sums = [int(number) for pair in _checksums(leaves) for number in np.asarray(pair)]
    weights = hashlib.sha256(json.dumps([names, sums]).encode()).hexdigest()
    return {"config": json.loads(json.dumps(to_dict(model.config))), "weights": weights}


@jax.jit
def _checksums(leaves: tuple[Array, ...]) -> list[UInt32[Array, "2"]]:
    """Two sums of each array's bits, every element with odd weights of its place: any single change changes both.

    They are made where the weights are: nothing but the sums is copied.
    """

    def one(x: Array) -> Array:
        bits = jax.lax.bitcast_convert_type(x, f"uint{8 * min(x.dtype.itemsize, 4)}").astype(jnp.uint32).reshape(-1)
        place = jax.lax.iota(jnp.uint32, bits.size)
        mixed = (place ^ (place >> 15)) * jnp.uint32(0x85EBCA6B)
        mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(0xC2B2AE35)
        weights = mixed | jnp.uint32(1), ((mixed >> 16) ^ (mixed * jnp.uint32(0x9E3779B9))) | jnp.uint32(1)
        return jnp.stack([jnp.sum(bits * weight, dtype=jnp.uint32) for weight in weights])

    return [one(x) for x in leaves]


def _like(model: LanguageModel, room: int) -> Any:
    """The shapes and dtypes of what is saved of a reading: its logits, cache and tokens seen."""
    cache = jax.eval_shape(lambda: model.init_cache(1, length=room))
    shape = (1, model.config.vocab_size)
    return jax.ShapeDtypeStruct(shape, jnp.float32), cache, jax.ShapeDtypeStruct(shape, bool)


def _named(arrays: Any) -> dict[str, Any]:
    return {f"{number:03}": leaf for number, leaf in enumerate(jax.tree.leaves(arrays))}


def _kind(x: Any) -> str:
    return f"{x.dtype}{list(x.shape)}"
