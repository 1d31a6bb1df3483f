"""The shapes of the op that are compiled, and the calls of each."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from delta_jax.ops import delta_rule, delta_rule_step


@dataclass(frozen=True, kw_only=True)
class Case:
    """A shape of the op, of batch 1 but for the step; bfloat16, with float32 beta and gates ("none", "head", "channel")."""

    name: str
    gate: str = "none"
    tokens: int = 8192
    key_heads: int = 32
    heads: int = 32
    key: int = 128
    value: int = 128
    decode_batch: int = 64


CASES = (
    Case(name="Gated DeltaNet, 32 heads", gate="head"),
    Case(name="Qwen3-Next", gate="head", key_heads=16),
    Case(name="Kimi Linear", gate="channel"),
    Case(name="DeltaNet 1.3B", key_heads=16, heads=16),
    Case(name="Gated DeltaNet 1.3B", gate="head", key_heads=6, heads=6, key=256, value=512),
    Case(name="heads of 64", gate="head", key=64, value=64),
    Case(name="few heads, long", gate="head", tokens=131072, key_heads=4, heads=4),
)
CALLS = ("forward", "forward_kept", "backward", "step")


def call_of(case: Case, call: str) -> tuple[Callable[..., Any], tuple[Any, ...], int]:
    """A function, the shapes of its arguments, and the bytes of the op's arguments and results, each once.

    The backward is what follows a forward that keeps something for it: of cotangents of the outputs, with what was kept.
    """

    def forward(arrays: dict[str, Any]) -> Any:
        return delta_rule(**arrays, implementation="pallas")[0]

    def backward(pull: Any, d_o: Any) -> Any:
        return pull(d_o)

    def step(state: Any, arrays: dict[str, Any]) -> Any:
        of_token = {f"{name}_t": x for name, x in arrays.items()}
        return delta_rule_step(**of_token, state=state, implementation="pallas")

    if call == "step":
        arrays = _arrays(case, case.decode_batch)
        state = jax.ShapeDtypeStruct((case.decode_batch, case.heads, case.key, case.value), jnp.float32)
        return step, (state, arrays), _bytes((state, arrays)) + _bytes(jax.eval_shape(step, state, arrays))
    arrays = _arrays(case, 1, case.tokens)
    o = jax.eval_shape(forward, arrays)
    if call == "forward":
        return forward, (arrays,), _bytes((arrays, o))
    if call == "forward_kept":
        return lambda arrays: jax.vjp(forward, arrays), (arrays,), _bytes((arrays, o))
    pull = jax.eval_shape(lambda arrays: jax.vjp(forward, arrays)[1], arrays)
    return backward, (pull, o), 2 * _bytes(arrays) + _bytes(o)


def _arrays(case: Case, *lead: int) -> dict[str, jax.ShapeDtypeStruct]:
    keys, gates = (*lead, case.key_heads, case.key), (*lead, case.heads)
    arrays = {"q": (keys, jnp.bfloat16), "k": (keys, jnp.bfloat16)}
    arrays |= {"v": ((*gates, case.value), jnp.bfloat16), "beta": (gates, jnp.float32)}
    if case.gate != "none":
        arrays["g"] = (gates if case.gate == "head" else (*gates, case.key), jnp.float32)
    return {name: jax.ShapeDtypeStruct(*about) for name, about in arrays.items()}


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
