"""The public doors of the op: each checks its arguments and hands them to the implementation that runs."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import Array
from jaxtyping import Float, Int

from delta_jax.ops import sequence
from delta_jax.ops.arguments import (
    Arguments,
    arguments_of,
    checked_array,
    forward_mode_explained,
    require_chunk_size,
    with_scale,
)
from delta_jax.ops.arrays import Arrays, Options
from delta_jax.ops.implementations import FEW_TOKENS, Implementation, choose
from delta_jax.ops.partition import Axes, by_parts
from delta_jax.ops.segments import segment_starts


def delta_rule(
    q: Float[Array, "batch time key_heads key"],
    k: Float[Array, "batch time key_heads key"],
    v: Float[Array, "batch time heads value"],
    beta: Float[Array, "batch time heads"] | None = None,
    g: Float[Array, "batch time heads"] | Float[Array, "batch time heads key"] | None = None,
    erase: Float[Array, "batch time erase_heads key"] | None = None,
    *,
    initial_state: Float[Array, "*layers batch heads key value"] | None = None,
    layer: Int[Array, ""] | None = None,
    segment_ids: Int[Array, "batch time"] | None = None,
    scale: float | Float[Array, ""] | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
    axis_name: str | None = None,
) -> tuple[Float[Array, "batch time heads value"], Float[Array, "*layers batch heads key value"]]:
    """The general delta rule: every member of the family is a choice of these inputs.

        S_t = (I - beta_t k_t e_t^T) Diag(exp g_t) S_{t-1} + beta_t k_t v_t^T        o_t = scale * S_t^T q_t

    Differentiable in every array. Tangents pushed forward (jax.jvp, jax.jacfwd, jax.linearize) need
    implementation="recurrent", for the others have a hand-written backward, which JAX will not push tangents through;
    jax.hessian, and gradients of gradients, work with "xla" too. Any axis may be symbolic in `jax.export` but those of
    heads, keys and values.

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
      layer: None, or which of `initial_state` `[layers, batch, heads, key, value]`, the states of all layers, is meant, as
        in `delta_rule_step`: with at most 8 tokens the kernels for TPUs read and write it where it lies, and have no
        gradient.
      segment_ids: integers `[batch, time]` of packed sequences: the state is reset to zero where the id changes.
      scale: multiplies the output; a finite number, or an array of no axes, which may be traced or learned. Default
        `key ** -0.5`.
      chunk_size: tokens a chunk of the chunkwise form, a power of two from 16 to 128. Default 32, for keys of at most 16
        channels 16: the fastest on a CPU; on GPUs 64, on TPUs 128. The Pallas kernels work on 128 (TPU) or 64 (GPU) tokens
        at a time whatever it says.
      implementation: "recurrent" (token by token, the definition), "xla" (chunkwise), "pallas" (kernels for TPUs: key and
        value sizes of 64, 128, 192, 256, 384 and 512, float32 and bfloat16; and for NVIDIA GPUs since Ampere: keys of 64,
        128 and 256, values of these and 512, bfloat16, and float16 and float32 to about 1e-5), or None: "pallas" on a TPU,
        and with bfloat16 on a Hopper GPU, where it can run, else "xla".

      axis_name: inside `jax.shard_map`, the axis of the mesh over which the tokens of every sequence are cut. Each device
        passes its own, in the order of the devices, with `segment_ids` as they are in the whole sequence, and the state
        before all tokens, and gets its own outputs and the state after all; both states are the same on every device.
        Then there are gradients in reverse mode alone. None: the tokens are all there are.

    Returns:
      `o` `[batch, time, heads, value]` in the dtype of `v`, and the final state `[batch, heads, key, value]` in float32
      (float64 for float64 inputs). Products accumulate in that dtype too. With a `layer` all states, the new one in its
      place.

    Raises:
      ValueError: for a shape, head count or dtype that does not fit, naming the argument; for lists and Python numbers in
        place of arrays, whose dtype would be a guess (arrays of NumPy are taken); for an implementation that cannot run
        here; and for tangents pushed forward through another than "recurrent" (under `jax.jit`, and where the function
        of `jax.linearize` is called, the error is a TypeError of JAX itself).

    Source: arXiv 2406.06484 section 3, arXiv 2412.06464 section 3, in their general asymmetric form.

    Examples:
        >>> k = jnp.eye(4)[None, :3, None]  # three tokens with three keys, one head: [1, 3, 1, 4]
        >>> v = jnp.arange(6.0).reshape(1, 3, 1, 2)
        >>> o, state = delta_rule(k, k, v, beta=jnp.ones((1, 3, 1)), scale=1.0)
        >>> o.shape, state.shape
        ((1, 3, 1, 2), (1, 1, 4, 2))
        >>> bool(jnp.allclose(state[0, 0, :3], v[0, :, 0]))  # what was written under each key
        True
    """
    arguments = arguments_of(q, k, v, beta, g, erase, initial_state, segment_ids, layers=layer is not None)
    return _run(arguments, layer, scale, chunk_size, implementation, axis_name)


def delta_product(
    q: Float[Array, "batch time key_heads key"],
    k: Float[Array, "batch time writes key_heads key"],
    v: Float[Array, "batch time writes heads value"],
    beta: Float[Array, "batch time writes heads"] | None = None,
    g: Float[Array, "batch time heads"] | Float[Array, "batch time heads key"] | None = None,
    erase: Float[Array, "batch time writes erase_heads key"] | None = None,
    *,
    initial_state: Float[Array, "*layers batch heads key value"] | None = None,
    layer: Int[Array, ""] | None = None,
    segment_ids: Int[Array, "batch time"] | None = None,
    scale: float | Float[Array, ""] | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
    axis_name: str | None = None,
) -> tuple[Float[Array, "batch time heads value"], Float[Array, "*layers batch heads key value"]]:
    """Several delta-rule writes a token: the gate comes before the first, the query after the last.

        S_{t,0} = Diag(exp g_t) S_{t-1}                                          S_t = S_{t,n}
        S_{t,j} = (I - beta_{t,j} k_{t,j} e_{t,j}^T) S_{t,j-1} + beta_{t,j} k_{t,j} v_{t,j}^T      o_t = scale * S_t^T q_t

    With one write it is `delta_rule`, whose options, results and errors it shares.

    Args:
      q, g: as in `delta_rule`, one a token.
      k, v, beta, erase: as in `delta_rule`, with an axis of the token's n writes, in order, after that of time: k is
        `[batch, time, writes, key_heads, key]`.
      initial_state, layer, segment_ids, scale: as in `delta_rule`.
      chunk_size: tokens a chunk. Default: as many as have 32 writes (16 for keys of at most 16 channels), or the next
        smaller power of two.
      implementation: as in `delta_rule`. "recurrent" and "xla" keep one query, gate and output a token; the Pallas
        kernels run on a sequence of time * writes tokens.

    Source: arXiv 2502.10297 section 3, with its gate on the first write.

    Examples:
        >>> q, k = jnp.ones((1, 3, 1, 4)), jnp.ones((1, 3, 2, 1, 4)) / 2  # two writes for each of three tokens
        >>> v, beta = jnp.ones((1, 3, 2, 1, 2)), jnp.ones((1, 3, 2, 1))
        >>> o, state = delta_product(q, k, v, beta)
        >>> o.shape, state.shape
        ((1, 3, 1, 2), (1, 1, 4, 2))
    """
    arguments = arguments_of(q, k, v, beta, g, erase, initial_state, segment_ids, writes=True, layers=layer is not None)
    return _run(arguments, layer, scale, chunk_size, implementation, axis_name)


def linear_attention(
    q: Float[Array, "batch time key_heads key"],
    k: Float[Array, "batch time key_heads key"],
    v: Float[Array, "batch time heads value"],
    g: Float[Array, "batch time heads"] | Float[Array, "batch time heads key"] | None = None,
    *,
    initial_state: Float[Array, "*layers batch heads key value"] | None = None,
    layer: Int[Array, ""] | None = None,
    segment_ids: Int[Array, "batch time"] | None = None,
    scale: float | Float[Array, ""] | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
    axis_name: str | None = None,
) -> tuple[Float[Array, "batch time heads value"], Float[Array, "*layers batch heads key value"]]:
    """The same machinery without the erase: linear attention, gated linear attention, RetNet, the Mamba-2 core.

        S_t = Diag(exp g_t) S_{t-1} + k_t v_t^T        o_t = scale * S_t^T q_t

    Arguments, results and errors are those of `delta_rule`. Source: arXiv 2312.06635 section 4.

    Examples:
        >>> x = jnp.ones((1, 3, 1, 4))
        >>> o, state = linear_attention(x, x, x, scale=1.0)
        >>> state[0, 0, 0, 0].item()  # nothing is erased: three tokens add up
        3.0
    """
    arguments = arguments_of(q, k, v, None, g, None, initial_state, segment_ids, layers=layer is not None)
    return _run(arguments, layer, scale, chunk_size, implementation, axis_name, erases=False)


def delta_rule_step(
    q_t: Float[Array, "batch key_heads key"],
    k_t: Float[Array, "batch key_heads key"],
    v_t: Float[Array, "batch heads value"],
    beta_t: Float[Array, "batch heads"] | None = None,
    g_t: Float[Array, "batch heads"] | Float[Array, "batch heads key"] | None = None,
    erase_t: Float[Array, "batch erase_heads key"] | None = None,
    *,
    state: Float[Array, "*layers batch heads key value"],
    layer: Int[Array, ""] | None = None,
    scale: float | Float[Array, ""] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "batch heads value"], Float[Array, "*layers batch heads key value"]]:
    """One token of `delta_rule`, for decoding: constant memory, the state read and written once.

    Args:
      q_t, k_t, v_t, beta_t, g_t, erase_t: as in `delta_rule`, without the time axis.
      state: `[batch, heads, key, value]`, the state before this token (float32, or float64 for float64 inputs).
      layer: None, or which of `state` `[layers, batch, heads, key, value]`, the states of all layers, is meant: an integer
        array of no axes, at least 0 and below `layers`. Where `state` is what a loop carries, nothing of it is copied.
      scale: as in `delta_rule`.
      implementation: as in `delta_rule`; "recurrent" and "xla" are the same for one token.

    Returns:
      The output `[batch, heads, value]` in the dtype of `v_t`, and the new state; with a `layer` all states, the new one
      in its place.

    Raises:
      ValueError: for a shape, head count or dtype that does not fit, naming the argument, and for an implementation
        that cannot run here.

    Examples:
        >>> k, v = jnp.eye(4)[None, :1], jnp.ones((1, 1, 2))  # one token, one head
        >>> o, state = delta_rule_step(k, k, v, state=jnp.zeros((1, 1, 4, 2)), scale=1.0)
        >>> o.tolist()  # read where it was written
        [[[1.0, 1.0]]]
        >>> o, state = delta_rule_step(k, k, 5 * v, state=state, scale=1.0)
        >>> o.tolist()  # the first value is erased
        [[[5.0, 5.0]]]
    """
    arguments = arguments_of(q_t, k_t, v_t, beta_t, g_t, erase_t, state, None, step=True, layers=layer is not None)
    return _run_step(arguments, layer, scale, implementation)


def delta_product_step(
    q_t: Float[Array, "batch key_heads key"],
    k_t: Float[Array, "batch writes key_heads key"],
    v_t: Float[Array, "batch writes heads value"],
    beta_t: Float[Array, "batch writes heads"] | None = None,
    g_t: Float[Array, "batch heads"] | Float[Array, "batch heads key"] | None = None,
    erase_t: Float[Array, "batch writes erase_heads key"] | None = None,
    *,
    state: Float[Array, "*layers batch heads key value"],
    layer: Int[Array, ""] | None = None,
    scale: float | Float[Array, ""] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "batch heads value"], Float[Array, "*layers batch heads key value"]]:
    """One token of `delta_product`, for decoding; arguments without the time axis, the rest as in `delta_rule_step`.

    Examples:
        >>> k, v = jnp.eye(4)[None, :2, None], jnp.ones((1, 2, 1, 3))  # two writes, one head
        >>> o, state = delta_product_step(k[:, 0], k, v, state=jnp.zeros((1, 1, 4, 3)))
        >>> o.shape, state.shape
        ((1, 1, 3), (1, 1, 4, 3))
    """
    arguments = arguments_of(
        q_t, k_t, v_t, beta_t, g_t, erase_t, state, None, step=True, writes=True, layers=layer is not None
    )
    return _run_step(arguments, layer, scale, implementation)


def linear_attention_step(
    q_t: Float[Array, "batch key_heads key"],
    k_t: Float[Array, "batch key_heads key"],
    v_t: Float[Array, "batch heads value"],
    g_t: Float[Array, "batch heads"] | Float[Array, "batch heads key"] | None = None,
    *,
    state: Float[Array, "*layers batch heads key value"],
    layer: Int[Array, ""] | None = None,
    scale: float | Float[Array, ""] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "batch heads value"], Float[Array, "*layers batch heads key value"]]:
    """One token of `linear_attention`, for decoding; arguments without the time axis, the rest as in `delta_rule_step`.

    Examples:
        >>> x, state = jnp.ones((1, 1, 4)), jnp.zeros((1, 1, 4, 4))
        >>> o, state = linear_attention_step(x, x, x, state=state, scale=1.0)
        >>> o.tolist()
        [[[4.0, 4.0, 4.0, 4.0]]]
    """
    arguments = arguments_of(q_t, k_t, v_t, None, g_t, None, state, None, step=True, layers=layer is not None)
    return _run_step(arguments, layer, scale, implementation, erases=False)


def _run_step(
    arguments: Arguments, layer: Any, scale: Any, implementation: str | None, *, erases: bool = True
) -> tuple[Array, Array]:
    chosen = choose(implementation, arguments)
    scale, q = with_scale(scale, arguments.q, arguments.k.shape[-1] ** -0.5)
    options = Options(scale, None, erases)

    def run(*arrays: Any) -> tuple[Array, Array]:
        *given, state, layer = arrays
        if layer is None:
            return chosen.step(Arrays._make((*given, state, None)), options)
        if chosen.in_place is None:
            return _apart(chosen.step, Arrays._make((*given, state, None)), options, layer)
        of_time = jax.tree.map(lambda x: x[:, None], given)
        o, state = chosen.in_place(Arrays._make((*of_time, state, None)), options, layer)
        return o[:, 0], state

    return _by_parts(run, arguments._replace(q=q), layer, chosen, step=True)


def _run(
    arguments: Arguments,
    layer: Any,
    scale: Any,
    chunk_size: int | None,
    implementation: str | None,
    axis_name: str | None,
    *,
    erases: bool = True,
) -> tuple[Array, Array]:
    chosen = choose(implementation, arguments)
    require_chunk_size(chunk_size)
    scale, q = with_scale(scale, arguments.q, arguments.q.shape[-1] ** -0.5)
    options = Options(scale, chunk_size, erases)
    if axis_name is not None:
        sequence.require_axis(axis_name, {"layer": layer})

    def run(*arrays: Any) -> tuple[Array, Array]:
        *given, segment_ids, layer = arrays
        if axis_name is not None:
            return sequence.over_axis(chosen, Arguments._make((*given, segment_ids)), options, axis_name)
        reset = None
        if segment_ids is not None:
            reset = segment_starts(segment_ids)
        whole = Arrays._make((*given, reset))
        if layer is None:
            return chosen.run(whole, options)
        time = whole.q.shape[1]
        if chosen.in_place is None or reset is not None or not (isinstance(time, int) and time <= FEW_TOKENS):
            return _apart(chosen.run, whole, options, layer)
        return chosen.in_place(whole, options, layer)

    with forward_mode_explained():
        return _by_parts(run, arguments._replace(q=q), layer, chosen)


def _apart(
    run: Callable[[Arrays, Options], tuple[Array, Array]], arrays: Arrays, options: Options, layer: Array
) -> tuple[Array, Array]:
    """What `run` makes of the state of a layer, taken out from those of all, with the new one in its place."""
    states: Any = arrays.initial_state
    state = jax.lax.dynamic_index_in_dim(states, layer, keepdims=False)
    # Were the old states still read when the new one is put among them, all would be copied.
    o, state = jax.lax.optimization_barrier(run(arrays._replace(initial_state=state), options))
    return o, jax.lax.dynamic_update_index_in_dim(states, state.astype(states.dtype), layer, 0)


def _by_parts(
    run: Callable[..., tuple[Array, Array]],
    arguments: Arguments,
    layer: Any,
    chosen: Implementation,
    *,
    step: bool = False,
) -> tuple[Array, Array]:
    """`run` of the arguments and the layer, every part of sequences and heads where it lies."""
    axes, given = _axes(arguments, step=step), tuple(arguments)[: -1 if step else None]
    if layer is not None:
        layer = checked_array("layer", layer, {}, "integers")
        axes = axes._replace(initial_state=(None, *axes.initial_state))
    results = axes.q, axes.initial_state
    return by_parts(run, (*given, layer), (*axes[: len(given)], ()), results, kernels=not chosen.cut_by_compiler)


class _Axes(NamedTuple):
    """What the axes of the arguments are, for `by_parts`."""

    q: Axes
    k: Axes
    v: Axes
    beta: Axes
    g: Axes
    erase: Axes
    initial_state: Axes
    segment_ids: Axes


def _axes(arguments: Arguments, *, step: bool = False) -> _Axes:
    time = ("batch",) if step else ("batch", None)
    of_writes = (*time, None) if arguments.k.ndim > arguments.q.ndim else time
    heads = ("heads", None)
    q, written, state = (*time, *heads), (*of_writes, *heads), ("batch", *heads, None)
    return _Axes(q, written, written, written[:-1], q, written, state, time)
