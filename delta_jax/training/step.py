"""The one jitted train step and the one jitted evaluation step."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float

from delta_jax.layers.mixture_of_experts import balanced_bias
from delta_jax.models import LanguageModel, ModelConfig
from delta_jax.models.language_model import Loads
from delta_jax.models.loss import counted_targets, token_nats
from delta_jax.parallel import batch_parts, batch_sharding, replicated
from delta_jax.training.config import TrainConfig
from delta_jax.training.optimizer import Schedule
from delta_jax.training.state import TrainState, abstract_model, abstract_state, merge_model

Batch = Mapping[str, Array]
Metrics = dict[str, Float[Array, ""]]
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def loss_sum(model: LanguageModel, batch: Batch) -> tuple[Float[Array, ""], Loads]:
    """Cross-entropy of one batch [B, T], summed over its targets that count, in nats; and the loads of the experts.

    The tokens that count in the loads are those whose targets count in the loss (`counted_targets`): padding and masked
    targets move no expert's bias.
    """
    counted = counted_targets(batch["targets"], batch["mask"])
    features, _, loads = model.features_and_loads(batch["inputs"], segment_ids=batch["segment_ids"], counted=counted)
    return jnp.sum(token_nats(model.head(features), batch["targets"], counted)), loads


def _tokens(batch: Batch) -> Float[Array, ""]:
    """How many targets count."""
    return jnp.sum(counted_targets(batch["targets"], batch["mask"]), dtype=jnp.float32)


def make_train_step(
    config: ModelConfig, optimizer: optax.GradientTransformation, schedule: Schedule, mesh: Mesh
) -> TrainStep:
    """Build ``(state, batch) -> (state, metrics)``, jitted on the mesh, the old state's memory reused.

    The loss and the gradient are means over all targets of the batch that count, those that are not negative and where the
    batch's mask is above zero: sums over the micro-batches, which are the leading axis of the batch's arrays
    [micro_batches, batch, time], divided by the number of such tokens at the end. After the optimizer, the biases of
    experts move by what the whole batch's loads say, of the tokens that count in the loss.

    Args:
        config: the model.
        optimizer: what turns gradients into updates.
        schedule: the optimizer's learning rate, for the metrics.
        mesh: where state and batch live.

    Returns:
        The step. Its metrics are float32: loss (nats per token), gradient_norm (before clipping),
        learning_rate and tokens (those in the batch that count).

    Examples:
        >>> mixer = MixerSpec(mixer="delta_net", options=(("num_heads", 2),))
        >>> config = ModelConfig(vocab_size=11, hidden_size=8, num_layers=1, pattern=(mixer,), mlp_size=0)
        >>> mesh, row = make_mesh(MeshConfig(), jax.devices()[:1]), np.ones((1, 2, 3), np.int32)
        >>> step = make_train_step(config, optax.sgd(0.1), lambda step: jnp.float32(0.1), mesh)
        >>> batch = {"inputs": row, "targets": row, "segment_ids": row, "mask": row.astype(np.float32)}
        >>> state, metrics = step(initial_state(config, optax.sgd(0.1), mesh, seed=0), shard_batch(batch, mesh))
        >>> int(state.step), float(metrics["tokens"])
        (1, 6.0)
    """
    structure, _ = abstract_model(config)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, optimizer, mesh))

    @functools.partial(jax.value_and_grad, has_aux=True)
    def micro_gradient(parameters: Any, batch: Batch) -> tuple[Float[Array, ""], Loads]:
        return loss_sum(merge_model(structure, parameters), batch)

    @_on(mesh)
    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        def accumulate(carry: Any, micro: Batch) -> tuple[Any, Loads]:
            (loss, loads), gradients = micro_gradient(state.parameters, micro)
            new = (loss, gradients)
            return jax.tree.map(lambda total, part: total + part.astype(jnp.float32), carry, new), loads

        if batch["inputs"].shape[0] == 1:
            only = jax.tree.map(lambda array: array[0], dict(batch))
            (loss, loads), gradients = micro_gradient(state.parameters, only)
        else:
            zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), state.parameters)
            (loss, gradients), loads = jax.lax.scan(accumulate, (jnp.zeros(()), zeros), dict(batch))
            loads = jax.tree.map(lambda load: jnp.sum(load, axis=0), loads)
        tokens = _tokens(batch)
        loss, gradients = jax.tree.map(lambda leaf: leaf / jnp.maximum(tokens, 1.0), (loss, gradients))
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.parameters)
        metrics = {
            "loss": loss,
            "gradient_norm": optax.tree.norm(gradients),
            "learning_rate": schedule(state.step),
            "tokens": tokens,
        }
        parameters = _balance(config, optax.apply_updates(state.parameters, updates), loads)
        return TrainState(step=state.step + 1, parameters=parameters, optimizer=optimizer_state), metrics

    train_step: TrainStep = jax.jit(
        step,
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )
    return train_step


def make_evaluation_step(config: ModelConfig, mesh: Mesh) -> jax.stages.Wrapped:
    """Build ``(parameters, batch) -> (nats, tokens)``: sums over a batch of arrays [1, batch, time].

    Examples:
        >>> mixer = MixerSpec(mixer="delta_net", options=(("num_heads", 2),))
        >>> config = ModelConfig(vocab_size=11, hidden_size=8, num_layers=1, pattern=(mixer,), mlp_size=0)
        >>> mesh, row = make_mesh(MeshConfig(), jax.devices()[:1]), np.ones((1, 2, 3), np.int32)
        >>> parameters = initial_state(config, optax.sgd(0.1), mesh, seed=0).parameters
        >>> batch = {"inputs": row, "targets": row, "segment_ids": row, "mask": row.astype(np.float32)}
        >>> nats, tokens = make_evaluation_step(config, mesh)(parameters, shard_batch(batch, mesh))
        >>> float(tokens)
        6.0
    """
    structure, _ = abstract_model(config)

    @_on(mesh)
    def step(parameters: Any, batch: Batch) -> tuple[Array, Array]:
        only = jax.tree.map(lambda array: array[0], dict(batch))
        return loss_sum(merge_model(structure, parameters), only)[0], _tokens(only)

    return jax.jit(step, out_shardings=replicated(mesh))


def abstract_batch(config: TrainConfig, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """The batch of a step, arrays [micro_batches, batch, time], as ShapeDtypeStructs that carry their sharding."""
    micro = config.gradient_accumulation
    shape, sharding = (micro, config.batch_size // micro, config.sequence_length), batch_sharding(mesh)
    dtypes = {"inputs": jnp.int32, "targets": jnp.int32, "segment_ids": jnp.int32, "mask": jnp.float32}
    return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for name, dtype in dtypes.items()}


def check_batch(config: TrainConfig, mesh: Mesh) -> None:
    """Raises a ValueError if the sequences of a micro-batch do not divide over the mesh, or the model refuses them."""
    micro, parts = config.batch_size // config.gradient_accumulation, batch_parts(mesh)
    if micro % parts:
        raise ValueError(
            f"batch_size / gradient_accumulation is {micro}: wanted a multiple of the {parts} parts into "
            f"which the mesh cuts the batch (data={mesh.shape['data']} x fsdp={mesh.shape['fsdp']})"
        )
    parameters = abstract_model(config.model)[1]
    jax.eval_shape(make_evaluation_step(config.model, mesh), parameters, abstract_batch(config, mesh))


def _balance(config: ModelConfig, parameters: Any, loads: Loads) -> Any:
    """The parameters with the biases of their experts moved towards equal loads."""
    if config.experts is None:
        return parameters
    blocks = dict(parameters["blocks"])
    for place, load in enumerate(loads):
        if load is not None:
            mlp = blocks[place]["mlp"]
            bias = balanced_bias(mlp["expert_bias"], load, config.experts.balance_rate)
            blocks[place] = blocks[place] | {"mlp": mlp | {"expert_bias": bias}}
    return parameters | {"blocks": blocks}


def _on[**P, R](mesh: Mesh) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Traces a function with the mesh set: the model asks what it is, and kernels ask for which device they are."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def traced(*arguments: P.args, **keywords: P.kwargs) -> R:
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                return function(*arguments, **keywords)

        return traced

    return decorate
