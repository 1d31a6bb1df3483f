"""The public door of the op: checks the arguments and picks an implementation."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from delta_jax.ops import recurrence
from delta_jax.ops.chunkwise import chunkwise
from delta_jax.ops.precision import accumulator_dtype
from delta_jax.ops.recurrence import recurrent

IMPLEMENTATIONS: dict[str, Callable[..., tuple[Array, Array]]] = {"recurrent": recurrent, "xla": chunkwise}
_UNAVAILABLE = {"pallas": "the Pallas kernels for TPU and GPU are not part of this version"}
_DTYPES = ("float32", "bfloat16", "float16", "float64")


def implementations() -> dict[str, str | None]:
    """What `implementation=` accepts here: None beside a name that can run, else the sentence that says why it cannot."""
    return dict.fromkeys(IMPLEMENTATIONS) | _UNAVAILABLE


def delta_rule(
    q: Float[Array, "batch time key_heads key"],
    k: Float[Array, "batch time key_heads key"],
    v: Float[Array, "batch time heads value"],
    beta: Float[Array, "batch time heads"] | None = None,
    g: Float[Array, "batch time heads"] | Float[Array, "batch time heads key"] | None = None,
    erase: Float[Array, "batch time erase_heads key"] | None = None,
    *,
    initial_state: Float[Array, "batch heads key value"] | None = None,
    segment_ids: Int[Array, "batch time"] | None = None,
    scale: float | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "batch time heads value"], Float[Array, "batch heads key value"]]:
    """The general delta rule: every member of the family is a choice of these inputs.

        S_t = (I - beta_t k_t e_t^T) Diag(exp g_t) S_{t-1} + beta_t k_t v_t^T        o_t = scale * S_t^T q_t

    Args:
      q: queries `[batch, time, key_heads, key]`; float32, bfloat16, float16, or float64 when x64 is enabled.
      k: write keys, shape and dtype of `q`. Not normalised here; the layers do that.
      v: values `[batch, time, heads, value]`; `heads` is a multiple of `key_heads`, and value heads `h*n ... h*n+n-1`
        share key head `h`.
      beta: step size `[batch, time, heads]`, any real number: [0, 1] in DeltaNet, [0, 2] with negative eigenvalues.
        Default 1.
      g: log decay (natural logarithm) `[batch, time, heads]`, or `[batch, time, heads, key]` for one a channel. None: no
        decay. Any non-positive number is exact, -1e4 included; positive numbers work until the state overflows.
      erase: erase keys `[batch, time, key_heads or heads, key]`. Default `k`.
      initial_state: `[batch, heads, key, value]`; belongs to the first segment. Default zero.
      segment_ids: integers `[batch, time]` of packed sequences: the state is reset to zero where the id changes.
      scale: multiplies the output. Default `key ** -0.5`.
      chunk_size: tokens a chunk of the chunkwise form, a power of two from 16 to 128. Default: what is fastest.
      implementation: "recurrent" (token by token, the definition), "xla" (chunkwise), or None to choose.

    Returns:
      `o` `[batch, time, heads, value]` in the dtype of `v`, and the final state `[batch, heads, key, value]` in float32
      (float64 for float64 inputs). Products accumulate in that dtype too.

    Raises:
      ValueError: for a shape, head count or dtype that does not fit, naming the argument, and for an implementation
        that cannot run here.

    Source: arXiv 2406.06484 section 3, arXiv 2412.06464 section 3, in their general asymmetric form.
    """
    _check(q, k, v, beta, g, erase, initial_state, segment_ids)
    return _run(
        q, k, v, beta, g, erase, initial_state, segment_ids, scale, chunk_size, implementation, erases=True
    )


def linear_attention(
    q: Float[Array, "batch time key_heads key"],
    k: Float[Array, "batch time key_heads key"],
    v: Float[Array, "batch time heads value"],
    g: Float[Array, "batch time heads"] | Float[Array, "batch time heads key"] | None = None,
    *,
    initial_state: Float[Array, "batch heads key value"] | None = None,
    segment_ids: Int[Array, "batch time"] | None = None,
    scale: float | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "batch time heads value"], Float[Array, "batch heads key value"]]:
    """The same machinery without the erase: linear attention, gated linear attention, RetNet, the Mamba-2 core.

        S_t = Diag(exp g_t) S_{t-1} + k_t v_t^T        o_t = scale * S_t^T q_t

    Arguments, results and errors are those of `delta_rule`. Source: arXiv 2312.06635 section 4.
    """
    _check(q, k, v, None, g, None, initial_state, segment_ids)
    return _run(
        q, k, v, None, g, None, initial_state, segment_ids, scale, chunk_size, implementation, erases=False
    )


def delta_rule_step(
    q_t: Float[Array, "batch key_heads key"],
    k_t: Float[Array, "batch key_heads key"],
    v_t: Float[Array, "batch heads value"],
    beta_t: Float[Array, "batch heads"] | None = None,
    g_t: Float[Array, "batch heads"] | Float[Array, "batch heads key"] | None = None,
    erase_t: Float[Array, "batch erase_heads key"] | None = None,
    *,
    state: Float[Array, "batch heads key value"],
    scale: float | None = None,
) -> tuple[Float[Array, "batch heads value"], Float[Array, "batch heads key value"]]:
    """One token of `delta_rule`, for decoding: constant memory, the state read and written once.

    Args:
      q_t, k_t, v_t, beta_t, g_t, erase_t: as in `delta_rule`, without the time axis.
      state: `[batch, heads, key, value]`, the state before this token (float32, or float64 for float64 inputs).
      scale: multiplies the output. Default `key ** -0.5`.

    Returns:
      The output `[batch, heads, value]` in the dtype of `v_t`, and the new state.

    Raises:
      ValueError: for a shape, head count or dtype that does not fit, naming the argument.
    """
    def with_time(x: Array | None) -> Array | None:
        return None if x is None else jax.ShapeDtypeStruct((*x.shape[:1], 1, *x.shape[1:]), x.dtype)  # type: ignore[return-value]

    _check(*map(with_time, (q_t, k_t, v_t, beta_t, g_t, erase_t)), state, None, step=True)
    dtype, heads = accumulator_dtype(v_t.dtype), v_t.shape[-2]
    repeat = functools.partial(recurrence.repeat_heads, num_heads=heads)
    q, k = repeat(q_t.astype(dtype)), repeat(k_t.astype(dtype))
    erase = k if erase_t is None else repeat(erase_t.astype(dtype))
    beta, g = (None if x is None else x.astype(dtype) for x in (beta_t, g_t))
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    o, state = recurrence.step(state.astype(dtype), q, k, v_t.astype(dtype), beta, g, erase, scale)
    return o.astype(v_t.dtype), state


def _run(
    q: Array,
    k: Array,
    v: Array,
    beta: Array | None,
    g: Array | None,
    erase: Array | None,
    initial_state: Array | None,
    segment_ids: Array | None,
    scale: float | None,
    chunk_size: int | None,
    implementation: str | None,
    *,
    erases: bool,
) -> tuple[Array, Array]:
    if implementation is None:
        implementation = "xla"
    if implementation not in IMPLEMENTATIONS:
        reason = _UNAVAILABLE.get(implementation, f"the names are {', '.join((*IMPLEMENTATIONS, *_UNAVAILABLE))}")
        raise ValueError(f"implementation={implementation!r} cannot run here: {reason}.")
    if chunk_size is not None and chunk_size not in (16, 32, 64, 128):
        raise ValueError(f"chunk_size must be 16, 32, 64 or 128, got {chunk_size!r}.")
    reset = None
    if segment_ids is not None:
        reset = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
    scale = k.shape[-1] ** -0.5 if scale is None else float(scale)
    function = jax.jit(IMPLEMENTATIONS[implementation], static_argnames=("scale", "chunk_size", "erases"))
    return function(
        q, k, v, beta, g, erase, initial_state, reset, scale=scale, chunk_size=chunk_size, erases=erases
    )


def _check(
    q: Array,
    k: Array,
    v: Array,
    beta: Array | None,
    g: Array | None,
    erase: Array | None,
    initial_state: Array | None,
    segment_ids: Array | None,
    *,
    step: bool = False,
) -> None:
    """Raises a ValueError that names the first argument that does not fit. `step`: speak without the time axis."""
    names = {name: f"{name}_t" for name in ("q", "k", "v", "beta", "g", "erase")} if step else {}
    names |= {"initial_state": "state"} if step else {}

    def shape_of(shape: tuple[int, ...]) -> tuple[int, ...]:
        return (shape[0], *shape[2:]) if step and len(shape) > 1 else shape

    def fail(name: str, array: Array, wanted: str) -> None:
        shown = array.shape if name == "initial_state" else shape_of(array.shape)
        raise ValueError(f"{names.get(name, name)} must {wanted}, got shape {shown} and dtype {array.dtype}.")

    for name, array, axes in (("q", q, "key_heads, key"), ("k", k, "key_heads, key"), ("v", v, "heads, value")):
        if array.ndim != 4:
            fail(name, array, f"have shape [batch, {'' if step else 'time, '}{axes}]")
        if str(array.dtype) not in _DTYPES:
            fail(name, array, f"have one of the dtypes {', '.join(_DTYPES)}")
    batch, time, key_heads, key = q.shape
    heads, value = v.shape[2:]
    if time < 1 or batch < 1:
        fail("q", q, "hold at least one token")
    if k.shape != q.shape:
        fail("k", k, f"have the shape of {names.get('q', 'q')}, {shape_of(q.shape)}")
    if v.shape[:2] != q.shape[:2]:
        fail("v", v, f"have the batch {'size' if step else 'and time'} of {names.get('q', 'q')}, {q.shape[: 1 if step else 2]}")
    if heads % key_heads:
        fail("v", v, f"have a number of heads that is a multiple of the {key_heads} key heads")
    wanted = {"beta": [(batch, time, heads)], "g": [(batch, time, heads), (batch, time, heads, key)]}
    wanted["erase"] = [(batch, time, key_heads, key), (batch, time, heads, key)]
    wanted["initial_state"], wanted["segment_ids"] = [(batch, heads, key, value)], [(batch, time)]
    given = {"beta": beta, "g": g, "erase": erase, "initial_state": initial_state, "segment_ids": segment_ids}
    for name, array in given.items():
        if array is not None and array.shape not in wanted[name]:
            shapes = wanted[name] if name == "initial_state" else map(shape_of, wanted[name])
            fail(name, array, "have shape " + " or ".join(map(str, dict.fromkeys(shapes))))
    for name, array in {"k": k, "v": v, "erase": erase}.items():
        if array is not None and array.dtype != q.dtype:
            fail(name, array, f"have the dtype of {names.get('q', 'q')}, {q.dtype}")
    for name, array in {"beta": beta, "g": g, "initial_state": initial_state}.items():
        if array is not None and array.dtype not in (q.dtype, accumulator_dtype(q.dtype)):
            fail(name, array, f"have dtype {' or '.join({str(q.dtype), str(accumulator_dtype(q.dtype))})}")
    if segment_ids is not None and not jnp.issubdtype(segment_ids.dtype, jnp.integer):
        fail("segment_ids", segment_ids, "be integers")
