"""The train state: an explicit, immutable pytree, and how it is laid out on a mesh."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from delta_jax.models import LanguageModel, ModelConfig
from delta_jax.parallel import ParameterRule, parameter_shardings, replicated
from delta_jax.training.optimizer import check_matrices


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class TrainState:
    """All that a step changes.

    Attributes:
        step: optimizer steps done.
        parameters: nested dictionary of float32 arrays.
        optimizer: the optax state.
        ema: the moving average of the parameters, float32 arrays in a dictionary as theirs; None where none is kept.

    Examples:
        >>> state = TrainState(step=jnp.int32(0), parameters={"kernel": jnp.ones((2, 2))}, optimizer=())
        >>> jax.tree.map(jnp.shape, state).parameters
        {'kernel': (2, 2)}
    """

    step: Any
    parameters: Any
    optimizer: Any
    ema: Any = None


def average_of(parameters: Any) -> Any:
    """The moving average before the first step: the parameters, in float32."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), parameters)


def moved_average(average: Any, parameters: Any, decay: float) -> Any:
    """decay * average + (1 - decay) * parameters, in a form that leaves what does not change as it is, bit for bit."""

    def move(old: Any, new: Any) -> Any:
        return old + (1 - decay) * (new.astype(jnp.float32) - old)

    return jax.tree.map(move, average, parameters)


def split_model(model: LanguageModel) -> tuple[Any, Any]:
    """A model as its static structure and a nested dictionary of parameters."""
    structure, parameters = nnx.split(model, nnx.Param)
    return structure, nnx.to_pure_dict(parameters)


def merge_model(structure: Any, parameters: Any) -> LanguageModel:
    """The inverse of ``split_model``."""
    model: LanguageModel = nnx.merge(structure, nnx.State(parameters))
    return model


def abstract_model(config: ModelConfig) -> tuple[Any, Any]:
    """Static structure and parameters as ShapeDtypeStructs; nothing is allocated."""
    return split_model(nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0))))


def abstract_state(
    parameters: Any,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    rules: Mapping[str, ParameterRule] | None = None,
    *,
    ema: bool = False,
) -> TrainState:
    """The train state as ShapeDtypeStructs that carry their shardings; the optimizer's and the average's are their
    parameters'.

    Args:
        parameters: what ``abstract_model`` gives.
        optimizer: an optax transformation. Parameters of the blocks are stacked over layers, [layers, ...]: what looks at a
            whole array at once (orthogonalisation, trust ratios, factored moments) has to be told so, as Muon is by
            ``muon_dimension_numbers``.
        mesh: where the state lives.
        rules: what the layers say of their parameters; see ``ModelConfig.parameter_rules``.
        ema: whether there is a moving average.

    Raises:
        ValueError: a parameter has no partition rule or does not divide over the mesh, or the optimizer is Muon without
            ``muon_dimension_numbers``.
    """
    shardings = parameter_shardings(parameters, mesh, rules)
    whole = replicated(mesh)

    def place(leaf: Any, sharding: Any) -> Any:
        if isinstance(leaf, optax.MaskedNode):  # a parameter that another part of the optimizer has
            return leaf
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    optimizer_state = jax.eval_shape(optimizer.init, parameters)
    check_matrices(optimizer_state, rules)
    optimizer_state = optax.tree_map_params(
        optimizer,
        place,
        optimizer_state,
        shardings,
        transform_non_params=lambda leaf: place(leaf, whole),
        is_leaf=lambda node: isinstance(node, optax.MaskedNode),
    )
    return TrainState(
        step=place(jax.eval_shape(lambda: jnp.zeros((), jnp.int32)), whole),
        parameters=jax.tree.map(place, parameters, shardings),
        optimizer=optimizer_state,
        ema=jax.tree.map(place, jax.eval_shape(average_of, parameters), shardings) if ema else None,
    )
