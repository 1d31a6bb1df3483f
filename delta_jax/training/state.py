"""The train state: an explicit, immutable pytree, and how it is made and laid out on a mesh."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Int

from delta_jax.models import LanguageModel, ModelConfig
from delta_jax.parallel import parameter_shardings, replicated
from delta_jax.training.optimizer import check_matrices


class TrainState(NamedTuple):
    """All that a step changes.

    Attributes:
        step: optimizer steps done.
        parameters: nested dictionary of float32 arrays.
        optimizer: the optax state.
    """

    step: Int[Array, ""]
    parameters: Any
    optimizer: Any


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


def abstract_state(config: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The train state as ShapeDtypeStructs that carry their shardings; the optimizer's are its parameters'.

    Args:
        config: the model.
        optimizer: an optax transformation. Parameters of the blocks are stacked over layers, [layers, ...]: what looks at a
            whole array at once (orthogonalisation, trust ratios, factored moments) has to be told so, as Muon is by
            ``muon_dimension_numbers``.
        mesh: where the state lives.

    Raises:
        ValueError: a parameter has no partition rule or does not divide over the mesh, or the optimizer is Muon without
            ``muon_dimension_numbers``.
    """
    _, parameters = abstract_model(config)
    shardings = parameter_shardings(parameters, mesh, config.parameter_rules)
    whole = replicated(mesh)

    def place(leaf: Any, sharding: Any) -> Any:
        if isinstance(leaf, optax.MaskedNode):  # a parameter that another part of the optimizer has
            return leaf
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    optimizer_state = jax.eval_shape(optimizer.init, parameters)
    check_matrices(optimizer_state, config.parameter_rules)
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
    )


def initial_state(config: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh, seed: int) -> TrainState:
    """A fresh train state, made in place on the mesh; the same numbers on any mesh.

    Args:
        config: the model.
        optimizer: its ``init`` is called on the parameters.
        mesh: where the state lives.
        seed: of the initialisation.

    Returns:
        The state at step 0.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, optimizer, mesh))

    def make() -> TrainState:
        _, parameters = split_model(LanguageModel(config, rngs=nnx.Rngs(seed)))
        return TrainState(step=jnp.zeros((), jnp.int32), parameters=parameters, optimizer=optimizer.init(parameters))

    state: TrainState = jax.jit(make, out_shardings=shardings)()
    return state
