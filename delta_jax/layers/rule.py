"""From a mixer's choice of inputs to the op: a whole sequence or one token, and cut over the mesh where that is needed."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float, Int

from delta_jax.layers.mixer_cache import OfLayer
from delta_jax.ops.arguments import Arguments
from delta_jax.ops.implementations import choose
from delta_jax.parallel import axis_of_tokens, by_heads, indivisible
from delta_jax.parallel.op import warn_uncut

__all__ = ["Rule", "RuleInputs", "apply_rule"]


class Rule(NamedTuple):
    """An op over a whole sequence, and over one token of it; both can be told a layer, as `delta_rule`."""

    whole: Callable[..., tuple[Array, Array]]
    step: Callable[..., tuple[Array, Array]]


class RuleInputs(NamedTuple):
    """The arguments of the op, with its shapes and defaults; the axis of writes is there in `delta_product` only."""

    q: Float[Array, "batch time heads key"]
    k: Float[Array, "batch time *writes heads key"]
    v: Float[Array, "batch time *writes v_heads value"]
    beta: Float[Array, "batch time *writes v_heads"] | None = None
    g: Float[Array, "batch time v_heads *key"] | None = None
    erase: Float[Array, "batch time *writes erase_heads key"] | None = None

    def axes_of_heads(self) -> "RuleInputs":
        """Where the heads of every input are."""
        of_writes = self.k.ndim - 2
        axes: dict[str, Any] = {name: 2 if name in ("q", "g") else of_writes for name in _given(self)}
        return RuleInputs(**axes)


def apply_rule(
    rule: Rule,
    inputs: RuleInputs,
    state: Float[Array, "batch v_heads key value"] | OfLayer | None,
    segment_ids: Int[Array, "batch time"] | None,
    *,
    scale: float | None,
    chunk_size: int | None,
    implementation: str | None,
) -> tuple[Float[Array, "batch time v_heads value"], Float[Array, "batch v_heads key value"] | OfLayer]:
    """The output and the new state by the rule, by its step for a single token that continues a state.

    A state that lies among those of all layers stays there.
    """
    given = Arguments(*inputs, None, segment_ids)
    chosen = choose(implementation, given)
    uncut = indivisible(inputs.q.shape[0], inputs.q.shape[2])
    if implementation is None and uncut and not chosen.cut_by_compiler:
        instead = choose(None, given, cut_by_compiler=True)
        warn_uncut(
            f"{uncut}, and the compiler cannot cut {chosen.name!r}",
            f"{instead.name!r} runs in its place. Ask for it by implementation={instead.name!r}, or make the mesh divide "
            "them.",
        )
        chosen, implementation = instead, instead.name
    elif uncut and chosen.cut_by_compiler:
        warn_uncut(uncut)
    options: dict[str, Any] = {"scale": scale, "implementation": implementation}
    axis = None if uncut else axis_of_tokens(inputs.q.shape[1])
    whole: Callable[..., tuple[Array, Any]]
    if state is not None and inputs.q.shape[1] == 1:
        whole = partial(_one_token, rule.step, options)
    else:
        over = {} if axis is None else {"axis_name": axis}
        whole = partial(_sequence, rule.whole, options | {"chunk_size": chunk_size} | over)
    if uncut and chosen.cut_by_compiler:
        return whole(inputs, state, segment_ids)
    return by_heads(whole, inputs, state, segment_ids, axes=inputs.axes_of_heads(), axis_name=axis)


def _given(inputs: RuleInputs) -> dict[str, Array]:
    return {name: x for name, x in inputs._asdict().items() if x is not None}


def _sequence(
    rule: Callable[..., tuple[Array, Array]],
    options: dict[str, Any],
    inputs: RuleInputs,
    state: Any,
    segment_ids: Array | None,
) -> tuple[Array, Array | OfLayer]:
    given = _given(inputs) | options | {"segment_ids": segment_ids}
    if isinstance(state, OfLayer) and "axis_name" in options:
        o, new = rule(**given, initial_state=state.taken())
        return o, state.put(new)
    if isinstance(state, OfLayer):
        o, states = rule(**given, initial_state=state.stack, layer=state.layer)
        return o, OfLayer(states, state.layer)
    return rule(**given, initial_state=state)


def _one_token(
    step: Callable[..., tuple[Array, Array]],
    options: dict[str, Any],
    inputs: RuleInputs,
    state: Any,
    segment_ids: Array | None,
) -> tuple[Array, Array | OfLayer]:
    token = {f"{name}_t": x for name, x in jax.tree.map(lambda x: x[:, 0], _given(inputs)).items()}
    if isinstance(state, OfLayer):
        o, states = step(**token, state=state.stack, layer=state.layer, **options)
        return o[:, None], OfLayer(states, state.layer)
    o, state = step(**token, state=state, **options)
    return o[:, None], state
