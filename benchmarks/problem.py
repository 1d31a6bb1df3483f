"""The inputs that every implementation is timed and checked on, and the float64 answer they are checked against.

NumPy only, so that an interpreter of any peer can import it. The answer is the recurrence itself, token by token,

    S_t = (I - beta_t k_t k_t^T) Diag(exp g_t) S_{t-1} + beta_t k_t v_t^T,    o_t = K^-1/2 S_t^T q_t,

and its gradients by reversing it; it shares no code with the library.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Arrays = dict[str, NDArray]

GATE_FLOOR = -5.0
"""The bounded gate of the per-channel problem is g = GATE_FLOOR * sigmoid(raw)."""

NAMES = ("q", "k", "v", "beta", "g")
"""Argument order of every timed function; the output's cotangent "do" follows."""


def make_inputs(tokens: int, heads: int, key_size: int, value_size: int, *, per_channel: bool, seed: int = 0) -> Arrays:
    """Draw float32 inputs of a batch of one: unit keys and queries, beta in (0, 1), decays as a new layer
    has them.

    Args:
        tokens: length of the sequence.
        heads: number of heads.
        key_size: channels of a key.
        value_size: channels of a value.
        per_channel: True makes "g" the raw bounded gate [1, T, H, K] (see `GATE_FLOOR`), False the log decay
            [1, T, H].
        seed: seed of the generator.

    Returns:
        q, k [1, T, H, K], v, do [1, T, H, V], beta [1, T, H] and g.
    """
    random = np.random.default_rng(seed)

    def unit(x: NDArray) -> NDArray:
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    arrays = {
        "q": unit(random.standard_normal((1, tokens, heads, key_size))),
        "k": unit(random.standard_normal((1, tokens, heads, key_size))),
        "v": random.standard_normal((1, tokens, heads, value_size)),
        "beta": 1 / (1 + np.exp(-random.standard_normal((1, tokens, heads)))),
        "do": random.standard_normal((1, tokens, heads, value_size)),
    }
    if per_channel:
        arrays["g"] = random.standard_normal((1, tokens, heads, key_size)) - 3.0
    else:
        rate = random.uniform(1.0, 16.0, heads)
        step = np.exp(random.uniform(np.log(1e-3), np.log(0.1), heads))
        bias = np.log(np.expm1(step))
        arrays["g"] = -rate * np.logaddexp(0.0, bias + random.standard_normal((1, tokens, heads)))
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def solve(inputs: Arrays) -> Arrays:
    """The float64 output "o" and the gradients "dq", "dk", "dv", "dbeta", "dg" of sum(o * do).

    Args:
        inputs: what `make_inputs` returned.

    Returns:
        Six float64 arrays, each of the shape of what it belongs to.
    """
    x = {name: array.astype(np.float64) for name, array in inputs.items()}
    per_channel = x["g"].ndim == 4
    gate = 1 / (1 + np.exp(-x["g"])) if per_channel else np.ones(())
    log_decay = GATE_FLOOR * gate if per_channel else x["g"]
    answer = {"o": np.zeros_like(x["v"])} | {"d" + name: np.zeros_like(x[name]) for name in NAMES}
    for head in range(x["q"].shape[2]):
        _solve_head(
            {name: x[name][0, :, head] for name in (*NAMES, "do")} | {"g": log_decay[0, :, head]},
            {name: array[0, :, head] for name, array in answer.items()},
        )
    if per_channel:
        answer["dg"] *= GATE_FLOOR * gate * (1 - gate)
    return answer


def _solve_head(x: Arrays, answer: Arrays) -> None:
    """Fill the views in `answer` for one head; `x` holds [T, K], [T, V], [T] or [T, K] arrays."""
    tokens, key_size = x["q"].shape
    scale = key_size**-0.5
    decay = np.exp(x["g"]).reshape(tokens, -1, 1)
    decayed = np.zeros((tokens, key_size, x["v"].shape[1]))
    state = np.zeros(decayed.shape[1:])
    error = np.zeros_like(x["v"])
    for t in range(tokens):
        decayed[t] = decay[t] * state
        error[t] = x["v"][t] - x["k"][t] @ decayed[t]
        state = decayed[t] + np.outer(x["k"][t], x["beta"][t] * error[t])
        answer["o"][t] = scale * (x["q"][t] @ state)
    d_state = np.zeros_like(state)
    for t in reversed(range(tokens)):
        q, k, beta, do = x["q"][t], x["k"][t], x["beta"][t], x["do"][t]
        answer["dq"][t] = scale * (decayed[t] @ do + k * (beta * error[t] @ do))
        d_state += np.outer(scale * q, do)
        d_write = k @ d_state
        answer["dv"][t] = beta * d_write
        answer["dbeta"][t] = d_write @ error[t]
        answer["dk"][t] = d_state @ (beta * error[t]) - decayed[t] @ (beta * d_write)
        d_decayed = d_state - np.outer(k, beta * d_write)
        d_gate = np.sum(d_decayed * decayed[t], axis=-1)
        answer["dg"][t] = d_gate if x["g"].ndim == 2 else d_gate.sum()
        d_state = decay[t] * d_decayed


def relative_errors(found: Arrays, answer: Arrays) -> dict[str, float]:
    """Root of the mean square of the error over that of the answer, for each array of `found`."""
    return {
        name: float(np.linalg.norm(np.asarray(array, np.float64) - answer[name]) / np.linalg.norm(answer[name]))
        for name, array in found.items()
    }


def save(folder: Path, name: str, inputs: Arrays) -> None:
    """Write the inputs and their answer where the runners find them."""
    arrays: dict[str, Any] = {"answer_" + key: value for key, value in solve(inputs).items()}
    np.savez(folder / f"{name}.npz", **inputs | arrays)


def load(folder: Path, name: str) -> tuple[Arrays, Arrays]:
    """The inputs and the answer that `save` wrote."""
    with np.load(folder / f"{name}.npz") as file:
        arrays = dict(file)
    answer = {key.removeprefix("answer_"): arrays.pop(key) for key in list(arrays) if key.startswith("answer_")}
    return arrays, answer
