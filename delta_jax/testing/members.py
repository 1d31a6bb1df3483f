"""The family as choices of the op's inputs, and the hard inputs every implementation has to get right."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from delta_jax.ops import (
    delta_product,
    delta_product_step,
    delta_rule,
    delta_rule_step,
    linear_attention,
    linear_attention_step,
)

BATCH, TIME, KEY_HEADS, HEADS, KEY, VALUE = 2, 83, 2, 4, 16, 24
Inputs = dict[str, np.ndarray]


def normalised(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def draw(rng: np.random.Generator, time: int = TIME, shape: tuple[int, ...] = ()) -> Inputs:
    """Everything a member may need, float64; keys are correlated, as those of real text are.

    Args:
      rng: where the numbers come from.
      time: tokens.
      shape: batch, key heads, value heads, key size, value size.

    Examples:
        >>> draw(np.random.default_rng(0), 3, (1, 2, 4, 8, 16))["beta"].shape
        (1, 3, 4)
    """
    batch, key_heads, heads, key, value = shape or (BATCH, KEY_HEADS, HEADS, KEY, VALUE)
    normal = rng.standard_normal
    return {
        "q": normalised(normal((batch, time, key_heads, key))),
        "k": normalised(normal((batch, time, key_heads, key)) + 1.0),
        "v": normal((batch, time, heads, value)),
        "beta": sigmoid(normal((batch, time, heads)) + 1),
        "gate_head": -np.exp(normal((batch, time, heads)) - 1.5),
        "gate_channel": -np.exp(normal((batch, time, heads, key)) - 1.5),
        "erase_gate": sigmoid(normal((batch, time, key_heads, key))),
        "write_gate": sigmoid(normal((batch, time, heads, value))),
        "initial_state": normal((batch, heads, key, value)),
    }


def _pick(x: Inputs, *names: str, **renamed: np.ndarray) -> Inputs:
    return {name: x[name] for name in names} | renamed


MEMBERS: dict[str, Callable[[Inputs], Inputs]] = {
    "linear_attention": lambda x: _pick(x, "q", "k", "v"),
    "gated_linear_attention": lambda x: _pick(x, "q", "k", "v", g=x["gate_channel"]),
    "mamba2": lambda x: _pick(x, "q", "k", "v", g=x["gate_head"]),
    "delta_net": lambda x: _pick(x, "q", "k", "v", "beta"),
    "negative_eigenvalues": lambda x: _pick(x, "q", "k", "v", beta=2 * x["beta"]),
    "gated_delta_net": lambda x: _pick(x, "q", "k", "v", "beta", g=x["gate_head"]),
    "kaczmarz": lambda x: _pick(
        x,
        "q",
        "v",
        k=3 * x["k"],
        beta=x["beta"] / (9 * np.square(x["k"]).sum(-1).repeat(x["v"].shape[2] // x["k"].shape[2], -1) + 1e-6),
        g=x["gate_head"],
    ),
    "online_scaled": lambda x: _pick(x, "q", "v", "beta", k=x["k"] * (0.5 + x["erase_gate"]), erase=x["k"]),
    "kimi_delta_attention": lambda x: _pick(x, "q", "k", "v", "beta", g=x["gate_channel"]),
    "gated_delta_net_2": lambda x: _pick(
        x, "q", "k", v=x["write_gate"] * x["v"], erase=x["erase_gate"] * x["k"], g=x["gate_channel"]
    ),
    "gated_delta_product": lambda x: _pick(x, "q", **_three_writes(x), g=x["gate_head"]),
}


def _three_writes(x: Inputs) -> Inputs:
    """Three writes a token, the last with the key of the first."""
    k, v, beta = x["k"], x["v"], x["beta"]
    stacks = {"k": [k, k[..., ::-1], k], "v": [v, v[..., ::-1], -0.5 * v], "beta": [beta, 0.7 * beta, beta]}
    return {name: np.stack(writes, 2) for name, writes in stacks.items()}


def op_of(member: str) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """The op of which a member is a choice of inputs.

    Examples:
        >>> op_of("gated_delta_net") is delta_rule
        True
    """
    if member == "gated_delta_product":
        return delta_product
    no_erase = ("linear_attention", "gated_linear_attention", "mamba2")
    return linear_attention if member in no_erase else delta_rule


def step_of(member: str) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """The op's step for decoding.

    Examples:
        >>> step_of("gated_delta_net") is delta_rule_step
        True
    """
    steps: dict[Any, Any] = {delta_product: delta_product_step, linear_attention: linear_attention_step}
    return steps.get(op_of(member), delta_rule_step)


def _gates(value: float, every: int) -> Callable[[Inputs], None]:
    def change(x: Inputs) -> None:
        x["gate_head"][:, ::every] = value
        x["gate_channel"][:, ::every, :, ::2] = value

    return change


def _steep_at_the_end(x: Inputs) -> None:
    """Gates that no rebasing minds, and then some that it does."""
    for name in ("gate_head", "gate_channel"):
        x[name][:] = -0.5 + 0.1 * np.tanh(x[name])
        x[name][:, -3:] = -50.0


def _repeated_keys(x: Inputs) -> None:
    x["k"][:] = x["k"][:, :1]
    x["beta"][:] = 1.0


def _reflections(x: Inputs) -> None:
    """Nearly equal keys and beta = 2: what breaks inverses made of matrix powers."""
    rng = np.random.default_rng(7)
    x["k"][:] = normalised(x["k"][:, :1] + 0.1 * rng.standard_normal(x["k"].shape))
    x["beta"][:] = 1.0  # the member with negative eigenvalues doubles it
    x["gate_head"][:] = x["gate_channel"][:] = 0.0


def _zeros(x: Inputs) -> None:
    x["beta"][:, ::3] = 0.0
    x["k"][:, 1::4] = 0.0
    x["v"][:, 2::5] = 0.0


def _large_keys(x: Inputs) -> None:
    """Keys that are not normalised; the step size keeps the recurrence itself stable."""
    x["k"] *= 4.0
    x["erase_gate"] /= 16.0
    x["beta"] /= 16.0


HARD: dict[str, Callable[[Inputs], None]] = {
    "plain": lambda x: None,
    "no_decay": lambda x: x.update(gate_head=0 * x["gate_head"], gate_channel=0 * x["gate_channel"]),
    "gate_-1_every_token": _gates(-1.0, 1),
    "gate_-50_at_the_end": _steep_at_the_end,
    "gate_-50_every_token": _gates(-50.0, 1),
    "gate_-50_sometimes": _gates(-50.0, 7),
    "gate_-1e4_sometimes": _gates(-1e4, 5),
    "chunk_decay_-500": _gates(-500 / 16, 1),
    "gate_above_zero": _gates(0.05, 3),
    "repeated_keys": _repeated_keys,
    "reflections": _reflections,
    "zeros": _zeros,
    "large_keys": _large_keys,
}


def problem(
    member: str, hard: str = "plain", time: int = TIME, seed: int = 0, shape: tuple[int, ...] = ()
) -> tuple[Inputs, tuple[np.ndarray, np.ndarray]]:
    """A member's inputs and the cotangents of its output and state: numbers of float32, which float64 holds exactly.

    Args:
      member: a name of `MEMBERS`.
      hard: a name of `HARD`.
      time: tokens.
      seed: of the numbers.
      shape: batch, key heads, value heads, key size, value size.

    Examples:
        >>> inputs, cotangents = problem("delta_net", "repeated_keys", time=3)
        >>> sorted(inputs), bool((inputs["k"][:, 0] == inputs["k"][:, 1]).all())
        (['beta', 'initial_state', 'k', 'q', 'v'], True)
    """
    rng = np.random.default_rng(seed)
    drawn = draw(rng, time, shape)
    HARD[hard](drawn)
    inputs = MEMBERS[member](drawn) | {"initial_state": drawn["initial_state"]}
    cotangents = rng.standard_normal(drawn["v"].shape), rng.standard_normal(drawn["initial_state"].shape)
    return jax.tree.map(lambda x: x.astype(np.float32).astype(np.float64), (inputs, cotangents))
