"""A member's results, the recurrence in float64, and how far one is from the other."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from delta_jax.testing.members import Inputs, op_of

Op = Callable[..., tuple[jax.Array, jax.Array]]


def rounded(x: np.ndarray) -> np.ndarray:
    """The nearest numbers of bfloat16.

    Examples:
        >>> rounded(np.array([1.001])).tolist()
        [1.0]
    """
    return np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64)


def evaluate(
    member: str,
    inputs: Inputs,
    dtype: Any,
    cotangents: tuple[np.ndarray, np.ndarray],
    *,
    op: Op | None = None,
    **options: Any,
) -> dict[str, np.ndarray]:
    """Outputs, final state and all gradients of one member, as numpy arrays named o, state, d_q, d_k ...

    Args:
      member: a name of `MEMBERS`.
      inputs: of `problem`.
      dtype: in which they are passed.
      cotangents: of `problem`.
      op: what is evaluated, with the signature of `delta_rule`; default the member's op of this library.
      options: for the op, segment_ids and implementation among them.

    Examples:
        >>> inputs, cotangents = problem("delta_net", time=3)
        >>> sorted(evaluate("delta_net", inputs, np.float32, cotangents))
        ['d_beta', 'd_initial_state', 'd_k', 'd_q', 'd_v', 'o', 'state']
    """
    arrays = {name: jnp.asarray(x, dtype) for name, x in inputs.items()}
    d_o, d_state = (jnp.asarray(x, dtype) for x in cotangents)
    segment_ids = options.pop("segment_ids", None)
    run = _compiled(op or op_of(member), tuple(sorted(options.items())))
    return {name: np.asarray(x, np.float64) for name, x in run(arrays, segment_ids, d_o, d_state).items()}


_CACHE: dict[Any, Any] = {}
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def _compiled(op: Op, options: tuple[tuple[str, Any], ...]) -> Any:
    key = (op, options, jax.config.jax_enable_x64)
    if key not in _CACHE:

        def run(arrays: Any, segment_ids: Any, d_o: Any, d_state: Any) -> dict[str, jax.Array]:
            def of_arrays(arrays: Any) -> Any:
                return op(**arrays, segment_ids=segment_ids, **dict(options))

            (o, state), vjp = jax.vjp(of_arrays, arrays)
            (grads,) = vjp((d_o, d_state.astype(state.dtype)))
            return {"o": o, "state": state} | {f"d_{name}": x for name, x in grads.items()}

        # The reference takes longer to optimise than to run, and has bits to spare.
        reference = jax.config.jax_enable_x64 and dict(options).get("implementation") == "recurrent"
        _CACHE[key] = jax.jit(run, compiler_options=QUICK if reference else None)
    return _CACHE[key]


def reference(
    member: str, inputs: Inputs, cotangents: tuple[np.ndarray, np.ndarray], **options: Any
) -> dict[str, np.ndarray]:
    """The recurrence in float64.

    Examples:
        >>> reference("delta_net", *problem("delta_net", time=3))["o"].dtype.name
        'float64'
    """
    with jax.enable_x64(True):
        return evaluate(member, inputs, np.float64, cotangents, **options, implementation="recurrent")


def relative_error(got: ArrayLike, want: ArrayLike) -> float:
    """Root-mean-square error over the root mean square of the reference; infinite where that is 0 and `got` is not.

    Both are compared in float64, whatever they come in.

    Examples:
        >>> relative_error(np.array([3.0, 3.0]), np.array([2.0, 2.0]))
        0.5
    """
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    error, size = np.sqrt(np.mean(np.square(got - want))), np.sqrt(np.mean(np.square(want)))
    return float(error / size) if size else (0.0 if error == 0 else np.inf)


def beyond_rounding(
    member: str, hard: str, inputs: Inputs, cotangents: tuple[np.ndarray, np.ndarray], got: Inputs, **options: Any
) -> list[str]:
    """What of a bfloat16 result is further from the reference than twice what rounding inputs and results does to it.

    A sentence for each; none if all is well.

    On hard inputs rounding may do next to nothing; there the limit is at least four units of the last place, 2^-6.

    Examples:
        >>> inputs, cotangents = problem("delta_net", time=3)
        >>> got = evaluate("delta_net", inputs, jnp.bfloat16, cotangents)
        >>> beyond_rounding("delta_net", "plain", inputs, cotangents, got)
        []
    """
    want = reference(member, inputs, cotangents, **options)
    nearest = {name: rounded(x) for name, x in inputs.items()}
    best = reference(member, nearest, (rounded(cotangents[0]), rounded(cotangents[1])), **options)
    found = []
    for name, x in want.items():
        limit = 2 * relative_error(best[name] if name == "state" else rounded(best[name]), x)
        if hard != "plain":
            limit = max(limit, 2.0**-6)
        error = relative_error(got[name], x)
        if not error <= limit:
            found.append(f"{member}, {hard}, {name}: {error:.2e} > {limit:.2e}")
    return found
