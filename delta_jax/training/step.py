"""The jitted train step and the jitted evaluation step, of which ``set_up`` makes one each."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float

from delta_jax.evaluation.perplexity import RowSums, row_sums
from delta_jax.layers.mixture_of_experts import balanced_bias
from delta_jax.models import ModelConfig
from delta_jax.models.language_model import Loads
from delta_jax.models.loss import counted_targets, token_nats
from delta_jax.parallel import batch_sharding, replicated
from delta_jax.training.state import TrainState, merge_model, moved_average

Batch = Mapping[str, Array]
Metrics = dict[str, Float[Array, ""]]


def make_train_step(
    config: ModelConfig,
    structure: Any,
    layout: TrainState,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    mesh: Mesh,
    *,
    frozen: Any = None,
    ema_decay: float | None = None,
) -> jax.stages.Wrapped:
    """Build ``(state, batch) -> (state, metrics)``, jitted on the mesh, the old state's memory reused.

    The loss and the gradient are means over all targets of the batch that count, those that are not negative and where the
    batch's mask is above zero: sums over the micro-batches, which are the leading axis of the batch's arrays
    [micro_batches, batch, time], divided by the number of such tokens at the end. After the optimizer, the biases of
    experts move by what the whole batch's loads say, of the tokens that count in the loss. What is frozen has no gradient,
    and stays bit for bit, those biases too. Last the moving average follows the parameters.

    Args:
        config: the model.
        structure: its static half, of ``abstract_model``.
        layout: the shardings of the state, as a state of them.
        optimizer: what turns gradients into updates.
        schedule: the optimizer's learning rate, for the metrics.
        mesh: where state and batch live.
        frozen: True for each parameter that is frozen, in a tree of them; None freezes none.
        ema_decay: of the moving average; None where the state has none.

    Returns:
        The step. Its metrics are float32: loss (nats per token), gradient_norm (of what is not frozen, before clipping),
        learning_rate and tokens (those in the batch that count).
    """

    def kept(old: Any, new: Any) -> Any:
        """What is frozen from the old tree, the rest from the new one."""
        if frozen is None:
            return new
        return jax.tree.map(lambda is_frozen, one, other: one if is_frozen else other, frozen, old, new)

    @functools.partial(jax.value_and_grad, has_aux=True)
    def micro_gradient(parameters: Any, batch: Batch) -> tuple[Float[Array, ""], Loads]:
        parameters = kept(jax.lax.stop_gradient(parameters), parameters)
        model, counted = merge_model(structure, parameters), counted_targets(batch["targets"], batch["mask"])
        features, _, loads = model.features_and_loads(
            batch["inputs"], segment_ids=batch["segment_ids"], counted=counted
        )
        return jnp.sum(token_nats(model.head(features), batch["targets"], counted)), loads

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
        tokens = jnp.sum(counted_targets(batch["targets"], batch["mask"]), dtype=jnp.float32)
        loss, gradients = jax.tree.map(lambda leaf: leaf / jnp.maximum(tokens, 1.0), (loss, gradients))
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.parameters)
        metrics = {
            "loss": loss,
            "gradient_norm": optax.tree.norm(gradients),
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
            "tokens": tokens,
        }
        parameters = _balance(config, optax.apply_updates(state.parameters, updates), loads)
        parameters = kept(state.parameters, parameters)
        ema = None if ema_decay is None else moved_average(state.ema, parameters, ema_decay)
        return TrainState(step=state.step + 1, parameters=parameters, optimizer=optimizer_state, ema=ema), metrics

    return jax.jit(
        step,
        in_shardings=(layout, batch_sharding(mesh)),
        out_shardings=(layout, replicated(mesh)),
        donate_argnums=0,
    )


def make_evaluation_step(structure: Any, mesh: Mesh) -> jax.stages.Wrapped:
    """Build ``(parameters, batch) -> row_sums``, jitted on the mesh, of a batch of arrays [1, batch, time]."""

    @_on(mesh)
    def step(parameters: Any, batch: Batch) -> RowSums:
        model: Any = merge_model(structure, parameters)
        return row_sums(model, jax.tree.map(lambda array: array[0], dict(batch)))

    return jax.jit(step, out_shardings=replicated(mesh))


def _balance(config: ModelConfig, parameters: Any, loads: Loads) -> Any:
    """The parameters with the biases of their experts moved towards equal loads."""
    if config.experts is None:
        return parameters
    blocks = dict(parameters["blocks"])
    for index, load in enumerate(loads):
        if load is not None:
            mlp = blocks[index]["mlp"]
            bias = balanced_bias(mlp["expert_bias"], load, config.experts.balance_rate)
            blocks[index] = blocks[index] | {"mlp": mlp | {"expert_bias": bias}}
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
