"""Reading published checkpoints into models, slab by slab: no more than one is ever in the host's memory."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, SingleDeviceSharding
from jaxtyping import Array

from delta_jax.interop.checkpoint import Checkpoint, abstract_leaves, open_checkpoint
from delta_jax.interop.layout import Piece, is_table
from delta_jax.interop.safetensors import DTYPES, Tensor, read_flat, readable
from delta_jax.models import LanguageModel
from delta_jax.parallel import parameter_shardings, path_string

__all__ = ["load_pretrained", "read_parameters"]

SLAB = 1 << 24  # bytes of a file that are in memory at once


def load_pretrained(
    source: str | Path,
    *,
    dtype: str = "float32",
    param_dtype: str | None = None,
    mesh: Mesh | None = None,
    ignore_keys: Sequence[str] = (),
) -> LanguageModel:
    """The model of a published checkpoint, such as Qwen3.5, Kimi Linear or one of flash-linear-attention's.

    Args:
        source: a folder of safetensors files with a config.json, or one such file; or a name on a hub, "owner/name", where
            huggingface_hub is installed and reaches it.
        dtype: of the computation.
        param_dtype: of the parameters; None is `dtype`. Decay rates and routing biases are float32 regardless.
        mesh: where the parameters go, each cut by its rule; None is the default device.
        ignore_keys: keys of config.json that are not known here and that you know to change nothing.

    Returns:
        The model; called with tokens [batch, time] it gives float32 logits [batch, time, vocab_size].

    Raises:
        ValueError: the checkpoint is damaged or incomplete, or not expressible; the message names the file, key or
            tensor, and nothing is loaded.

    Examples:
        >>> model = load_pretrained("qwen3_5")  # a folder with config.json and model.safetensors
        >>> model.config.layers[0].mixer.mixer, model(jnp.array([[1, 2, 3]])).shape
        ('gated_delta_net', (1, 3, 61))
    """
    checkpoint = open_checkpoint(source, ignore_keys)
    config = replace(checkpoint.model, dtype=dtype, param_dtype=dtype if param_dtype is None else param_dtype)
    checkpoint = replace(checkpoint, model=config)
    model = nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))
    structure, state = nnx.split(model, nnx.Param)
    parameters = nnx.to_pure_dict(state)
    if mesh is None:
        where = SingleDeviceSharding(jax.devices()[0])
        shardings = jax.tree.map(lambda _: where, parameters)
    else:
        shardings = parameter_shardings(parameters, mesh, config.parameter_rules)
    loaded: LanguageModel = nnx.merge(structure, nnx.State(read_parameters(checkpoint, shardings)))
    return loaded


def read_parameters(checkpoint: Checkpoint, shardings: Any) -> Any:
    """The parameters of a checkpoint as a nested dictionary, each where its sharding says.

    Args:
        checkpoint: opened, whose `model` says the dtypes.
        shardings: a sharding for each parameter, in a nested dictionary.

    Raises:
        ValueError: a file is cut off, or holds a head beside the embedding it is tied to that is not equal to it.
    """
    with readable(checkpoint.folder):
        for name in checkpoint.heads:
            _require_equal(checkpoint, name)
    pieces: dict[str, list[tuple[Tensor, Piece]]] = {}
    for name, target in checkpoint.layout.targets.items():
        for piece in target.pieces:
            pieces.setdefault(piece.leaf, []).append((checkpoint.tensors[name], piece))
    leaves = abstract_leaves(checkpoint.model)

    def read(path: tuple[Any, ...], sharding: Any) -> Array:
        name = path_string(path)
        return _read_leaf(name, leaves[name], pieces.get(name, []), sharding)

    with readable(checkpoint.folder):
        return jax.tree_util.tree_map_with_path(read, shardings)


def _read_leaf(
    name: str, leaf: jax.ShapeDtypeStruct, pieces: Sequence[tuple[Tensor, Piece]], sharding: jax.sharding.Sharding
) -> Array:
    """One parameter: every part of it is filled on its device."""
    parts: dict[Any, Array] = {}
    arrays = []
    for device, index in sharding.addressable_devices_indices_map(leaf.shape).items():
        whole = index or (slice(None),) * len(leaf.shape)
        ranges = tuple(s.indices(size)[:2] for s, size in zip(whole, leaf.shape, strict=True))
        if ranges in parts:
            arrays.append(jax.device_put(parts[ranges], device))
            continue
        shape = tuple(stop - start for start, stop in ranges)
        part = jax.device_put(jnp.zeros(shape, leaf.dtype), device)
        for tensor, piece in pieces:
            inner = leaf.shape[len(piece.index) :]
            kind = "vector" if len(inner) == 1 else "table" if is_table(name) else "matrix"
            for rows, starts in _slabs(tensor, piece, leaf.shape, ranges, kind):
                part = _put(part, jax.device_put(rows, device), starts, kind=kind)
        parts[ranges] = part
        arrays.append(part)
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, arrays)


def _slabs(
    tensor: Tensor, piece: Piece, shape: tuple[int, ...], ranges: tuple[tuple[int, int], ...], kind: str
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """What of a piece lies in a part of a leaf, as rows [count, rest], and where in the part each begins."""
    lead = len(piece.index)
    if not all(start <= at < stop for at, (start, stop) in zip(piece.index, ranges[:lead], strict=True)):
        return
    own, inner = shape[lead:], ranges[lead:]
    of_rows = len(own) - 1 if kind == "matrix" else 0
    of_rest = 1 - of_rows if len(own) == 2 else None
    width = 1 if of_rest is None else own[of_rest]
    first, last = max(piece.column, inner[of_rows][0]), min(piece.column + piece.count, inner[of_rows][1])
    step = max(1, SLAB // (width * DTYPES[tensor.dtype].itemsize))
    begin = [at - start for at, (start, _) in zip(piece.index, ranges[:lead], strict=True)] + [0] * len(own)
    for start in range(first, last, step):
        count = min(step, last - start)
        row = piece.start + start - piece.column
        rows = read_flat(tensor, row * width, count * width).reshape(count, width)
        if rows.dtype == np.float64:
            rows = rows.astype(np.float32)
        if of_rest is not None:
            rows = rows[:, slice(*inner[of_rest])]
        begin[lead + of_rows] = start - inner[of_rows][0]
        yield rows, np.asarray(begin, np.int32)


@partial(jax.jit, donate_argnums=0, static_argnames="kind")
def _put(part: Array, rows: Array, starts: Array, *, kind: str) -> Array:
    """A part of a leaf with rows [count, rest] written into it."""
    values = rows.astype(part.dtype)
    if kind == "matrix":
        values = values.T
    elif kind == "vector":
        values = values[:, 0]
    shape = (1,) * (part.ndim - values.ndim) + values.shape
    return jax.lax.dynamic_update_slice(part, values.reshape(shape), [starts[n] for n in range(part.ndim)])


def _require_equal(checkpoint: Checkpoint, head: str) -> None:
    """Raises a ValueError if a head is not the embedding to which config.json ties it."""
    tied, other = checkpoint.tensors[head], checkpoint.tensors[checkpoint.layout.embedding]
    step = SLAB // DTYPES[other.dtype].itemsize
    if tied.shape == other.shape and tied.dtype in DTYPES:
        total = math.prod(other.shape)
        chunks = ((start, min(step, total - start)) for start in range(0, total, step))
        if all(np.array_equal(read_flat(tied, *chunk), read_flat(other, *chunk)) for chunk in chunks):
            return
    raise ValueError(f"{tied.path}: {head} is not {other.name}, to which config.json ties it")
