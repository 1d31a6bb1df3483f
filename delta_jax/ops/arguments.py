"""What people pass to the ops and layers: which arrays fit, and the sentence for those that do not."""

import math
import numbers
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from delta_jax.ops.precision import accumulator_dtype

__all__ = [
    "Arguments",
    "arguments_of",
    "as_array",
    "attention_arguments",
    "checked_array",
    "forward_mode_explained",
    "require_chunk_size",
    "require_count",
    "with_scale",
]

DTYPES = ("float32", "bfloat16", "float16", "float64")


class Arguments(NamedTuple):
    """The arrays of the op."""

    q: Array
    k: Array
    v: Array
    beta: Array | None
    g: Array | None
    erase: Array | None
    initial_state: Array | None
    segment_ids: Array | None


def as_array(name: str, x: Any) -> Array:
    """`x` as an array of JAX, if it is one of JAX or NumPy, or holds one as an `nnx.Param` does.

    Raises:
      ValueError: it is anything else. Lists and Python numbers are refused: their dtype would be a guess.
    """
    if isinstance(x, jax.Array):
        return x
    if isinstance(x, np.ndarray | np.generic) or hasattr(x, "__jax_array__"):
        try:
            return jnp.asarray(x)
        except TypeError:
            raise ValueError(f"{name} must be an array of numbers, got dtype {x.dtype}.") from None
    raise ValueError(f"{name} must be an array, as jnp.asarray makes one, got {type(x).__name__}.")


def checked_array(
    name: str, x: Any, axes: Mapping[str, Any], kind: Literal["floating", "integers", "any"] = "floating"
) -> Array:
    """`x` as an array of JAX, if its shape and dtype fit.

    Args:
      name: of the argument.
      x: what was passed.
      axes: the names of its axes, in order, and their sizes where these are known; an axis "..." in front stands for
        any number of them.
      kind: of its numbers.

    Raises:
      ValueError: it does not fit; the sentence names it, and the axes that were wanted.
    """
    x = as_array(name, x)
    lead = "..." in axes
    sizes = [size for axis, size in axes.items() if axis != "..."]
    fits = x.ndim >= len(sizes) if lead else x.ndim == len(sizes)
    pairs = zip(sizes, x.shape[x.ndim - len(sizes) :], strict=True) if fits else ()
    if not fits or any(wanted is not None and wanted != size for wanted, size in pairs):
        shown = ", ".join(axis if size is None else f"{axis}={size}" for axis, size in axes.items())
        raise ValueError(f"{name} must have shape [{shown}], got shape {x.shape} and dtype {x.dtype}.")
    if kind == "integers" and not jnp.issubdtype(x.dtype, jnp.integer):
        raise ValueError(f"{name} must be integers, got shape {x.shape} and dtype {x.dtype}.")
    if kind == "floating" and str(x.dtype) not in DTYPES:
        raise ValueError(f"{name} must have one of the dtypes {', '.join(DTYPES)}, got {x.dtype}.")
    return x


def arguments_of(*given: Any, step: bool = False, writes: bool = False, layers: bool = False) -> Arguments:
    """The arrays of the op, in the order of `Arguments`, once they are known to fit.

    Args:
      given: what was passed.
      step: whether there is no axis of time, as for one token.
      writes: whether what is written has an axis of the token's writes.
      layers: whether the state is those of several layers.

    Raises:
      ValueError: one does not fit; the sentence names the first such argument and the axes that were wanted.
    """
    names = [_shown(name, step) for name in Arguments._fields]
    arrays = [None if x is None else as_array(name, x) for name, x in zip(names, given, strict=True)]
    for name in ("q", "k", "v", *(["initial_state"] if step or layers else [])):
        if arrays[Arguments._fields.index(name)] is None:
            raise ValueError(f"{_shown(name, step)} must be an array, got None.")
    arguments = Arguments(*arrays)  # type: ignore[arg-type]
    _check(arguments, step, writes, layers)
    return arguments


def _shown(name: str, step: bool) -> str:
    return {"initial_state": "state"}.get(name, f"{name}_t") if step else name


def _check(arguments: Arguments, step: bool, writes: bool, layers: bool) -> None:
    given = {name: array for name, array in arguments._asdict().items() if array is not None}
    lead = ["batch"] if step else ["batch", "time"]
    lead_of_writes = [*lead, "writes"] if writes else lead
    layouts: dict[str, list[list[str]]] = {
        "q": [[*lead, "key_heads", "key"]],
        "k": [[*lead_of_writes, "key_heads", "key"]],
        "v": [[*lead_of_writes, "heads", "value"]],
        "beta": [[*lead_of_writes, "heads"]],
        "g": [[*lead, "heads"], [*lead, "heads", "key"]],
        "erase": [[*lead_of_writes, "key_heads", "key"], [*lead_of_writes, "heads", "key"]],
        "initial_state": [[*(["layers"] if layers else []), "batch", "heads", "key", "value"]],
        "segment_ids": [lead],
    }
    q, k, v = arguments.q, arguments.k, arguments.v

    def fail(name: str, wanted: str, end: str = "") -> NoReturn:
        array = given[name]
        raise ValueError(f"{_shown(name, step)} must {wanted}, got shape {array.shape} and dtype {array.dtype}{end}.")

    for name in ("q", "k", "v"):
        if given[name].ndim != len(layouts[name][0]):
            fail(name, f"have shape {_listed(layouts[name])}")
        if str(given[name].dtype) not in DTYPES:
            fail(name, f"have one of the dtypes {', '.join(DTYPES)}")
    leading, of_writes = q.shape[: len(lead)], k.shape[: len(lead_of_writes)]
    sizes = dict(zip(lead_of_writes, of_writes, strict=True)) | dict(zip(lead, leading, strict=True))
    sizes |= {"key_heads": q.shape[-2], "key": q.shape[-1], "heads": v.shape[-2], "value": v.shape[-1]}
    if layers:  # any number of them
        sizes["layers"] = next(iter(given["initial_state"].shape), 0)

    def shapes(name: str, sizes: Mapping[str, int]) -> list[tuple[int, ...]]:
        return [tuple(sizes[axis] for axis in axes) for axes in layouts[name]]

    def require_shape(name: str, wanted: str) -> None:
        shape = given[name].shape
        if shape not in shapes(name, sizes):
            # Would it fit if the axes that were taken for time and heads were the other way round?
            exchanged = sizes | {
                "time": sizes["heads"],
                "heads": sizes.get("time", 0),
                "key_heads": sizes.get("time", 0),
            }
            end = "; time comes before the heads" if not step and shape in shapes(name, exchanged) else ""
            fail(name, f"have {wanted}, {_listed(layouts[name])}", end)

    if 0 in q.shape:
        fail("q", "hold at least one token of one head")
    if 0 in of_writes:
        fail("k", "hold at least one write a token")
    between = f" and an axis of writes before the heads, {(*leading, 'writes', *q.shape[-2:])}" if writes else ""
    require_shape("k", f"the shape of {_shown('q', step)}, {q.shape}{between}")
    if v.shape[: len(lead_of_writes)] != of_writes:
        other = _shown("k" if writes else "q", step)
        turned = not step and v.shape[-2] == q.shape[-2] and v.shape[1] % q.shape[1] == 0
        wanted = f"have the {' and '.join(lead_of_writes)} of {other}, {of_writes}, {_listed(layouts['v'])}"
        fail("v", wanted, "; time comes before the heads" if turned else "")
    if sizes["heads"] == 0 or sizes["heads"] % sizes["key_heads"]:
        fail("v", f"have a number of heads that is a multiple of the {sizes['key_heads']} key heads")
    for name in ("beta", "g", "erase", "initial_state", "segment_ids"):
        if name in given:
            require_shape(name, "shape " + " or ".join(map(str, dict.fromkeys(shapes(name, sizes)))))
    for name in given.keys() & {"k", "v", "erase"}:
        if given[name].dtype != q.dtype:
            fail(name, f"have the dtype of {_shown('q', step)}, {q.dtype}")
    for name in given.keys() & {"beta", "g", "initial_state"}:
        if given[name].dtype not in (q.dtype, accumulator_dtype(q.dtype)):
            fail(name, f"have dtype {' or '.join(dict.fromkeys((str(q.dtype), str(accumulator_dtype(q.dtype)))))}")
    if "segment_ids" in given and not jnp.issubdtype(given["segment_ids"].dtype, jnp.integer):
        fail("segment_ids", "be integers")


def _listed(layouts: Sequence[Sequence[str]]) -> str:
    return " or ".join(f"[{', '.join(axes)}]" for axes in layouts)


def attention_arguments(
    q: Any, k: Any, v: Any, *, scale: Any, window: Any, positions: Any
) -> tuple[Array, Array, Array, float]:
    """The arrays of `attend` once they are known to fit, and its scale; one that is an array has gone into q.

    Raises:
      ValueError: one does not fit; the sentence names the first such argument and what was wanted.
    """
    q = checked_array("q", q, dict.fromkeys(("batch", "time", "heads", "key")))
    batch, time, heads, key = q.shape
    k = checked_array("k", k, {"batch": batch, "keys": None, "kv_heads": None, "key": key})
    v = checked_array("v", v, {"batch": batch, "keys": k.shape[1], "kv_heads": k.shape[2], "value": None})
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise ValueError(f"{name} must have the dtype of q, {q.dtype}, got {x.dtype}.")
    if 0 in (*q.shape, *k.shape) or heads % k.shape[2]:
        raise ValueError(f"q must have a multiple of the {k.shape[2]} heads of k, and a token, got shape {q.shape}.")
    if v.shape[3] > key:
        raise ValueError(f"v must have at most the {key} channels of k, got shape {v.shape}.")
    if window is not None:
        require_count("window", window)
    if positions is None and k.shape[1] != time:
        raise ValueError(f"positions must be given where k has other tokens than q, got {k.shape[1]} and {time}.")
    for whose, x, tokens in zip(("queries", "keys"), positions or (), (time, k.shape[1]), strict=False):
        for field, numbers_ in x._asdict().items():
            checked_array(f"{field} of the {whose}' positions", numbers_, {"batch": batch, "time": tokens}, "integers")
    dtype = q.dtype
    scale, q = with_scale(scale, q, key**-0.5)
    return q.astype(dtype), k, v, scale


def require_count(name: str, number: Any, why: str = "") -> None:
    """Raises a ValueError if this is neither a positive integer nor a symbolic dimension of `jax.export`."""
    if jax.export.is_symbolic_dim(number):
        return
    if not isinstance(number, int) or isinstance(number, bool) or not 1 <= number < 2**31:
        wanted = f"a positive integer{why}" if not isinstance(number, int) or number < 2**31 else "below 2^31"
        raise ValueError(f"{name} must be {wanted}, got {number!r}.")


def require_chunk_size(chunk_size: Any) -> None:
    """Raises a ValueError if this is neither None nor a size that chunks may have."""
    if chunk_size is not None and not (isinstance(chunk_size, int | np.integer) and chunk_size in (16, 32, 64, 128)):
        raise ValueError(f"chunk_size must be 16, 32, 64 or 128, got {chunk_size!r}.")


def with_scale(scale: Any, q: Array, default: float) -> tuple[float, Array]:
    """A scale that is known when the op is compiled, and the queries, which take on one that is not.

    Args:
      scale: None, a number, or an array of no axes: traced, learned, or of JAX. NumPy's count as numbers.
      q: queries.
      default: the scale where it is None.

    Returns:
      The number, and q; or 1, and q times the scale in float32 (float64 for float64 queries), which is differentiable.

    Raises:
      ValueError: it is none of these, or no finite number.
    """
    if scale is None:
        return default, q
    if isinstance(scale, np.ndarray) and scale.ndim == 0:
        scale = scale[()]
    if isinstance(scale, numbers.Real | np.number) and not isinstance(scale, bool | complex | np.complexfloating):
        if not math.isfinite(scale):
            raise ValueError(f"scale must be a finite number, got {scale!r}.")
        return float(scale), q
    if isinstance(scale, numbers.Number | np.generic | Sequence):
        raise ValueError(f"scale must be a number or an array of no axes, got {scale!r}.")
    scale = as_array("scale", scale)
    if scale.ndim or not (jnp.issubdtype(scale.dtype, jnp.floating) or jnp.issubdtype(scale.dtype, jnp.integer)):
        raise ValueError(
            f"scale must be a number or an array of no axes, got shape {scale.shape} and dtype {scale.dtype}."
        )
    wide = accumulator_dtype(q.dtype)
    return 1.0, q.astype(wide) * scale.astype(wide)


@contextmanager
def forward_mode_explained() -> Iterator[None]:
    """Says what to do where JAX says that it cannot push tangents through a hand-written backward."""
    try:
        yield
    except TypeError as error:
        if "forward-mode" not in str(error):
            raise
        raise ValueError(
            "implementation must be 'recurrent' for forward-mode differentiation (jax.jvp, jax.jacfwd, jax.linearize):"
            " the others have a hand-written backward, which knows reverse mode only."
        ) from error
