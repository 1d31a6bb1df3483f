"""Everything that a run is made of besides its data, each thing made once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from delta_jax.models import LanguageModel
from delta_jax.parallel import batch_parts, batch_sharding, make_mesh
from delta_jax.training.config import TrainConfig
from delta_jax.training.groups import frozen_mask
from delta_jax.training.optimizer import learning_rate_schedule, make_optimizer
from delta_jax.training.state import TrainState, abstract_model, abstract_state, average_of, split_model
from delta_jax.training.step import make_evaluation_step, make_train_step


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a run is made of.

    Attributes:
        config: the run.
        mesh: its devices.
        structure: the model without its parameters; `merge_model` puts them in.
        optimizer: what turns gradients into updates.
        state: the train state as ShapeDtypeStructs that carry their shardings.
        batch: the batch of a train step likewise, arrays [micro_batches, batch, time].
        evaluation_batch: the batch of an evaluation step likewise, arrays [1, batch, time].
        train_step: ``(state, batch) -> (state, metrics)``, jitted; see ``make_train_step``.
        evaluation_step: ``(parameters, batch) -> row_sums``, jitted; see ``delta_jax.evaluation.row_sums``.

    Examples:
        >>> mixer = MixerSpec(mixer="delta_net", options=(("num_heads", 2),))
        >>> model = ModelConfig(vocab_size=11, hidden_size=8, num_layers=1, pattern=(mixer,), intermediate_size=0)
        >>> config = TrainConfig(model=model, steps=2, batch_size=1, sequence_length=3)
        >>> setup = set_up(config, jax.devices()[:1])
        >>> sorted(setup.state.parameters)  # nothing is allocated
        ['blocks', 'embed', 'final_norm', 'lm_head']
    """

    config: TrainConfig
    mesh: Mesh
    structure: Any
    optimizer: optax.GradientTransformation
    state: TrainState
    batch: Mapping[str, jax.ShapeDtypeStruct]
    evaluation_batch: Mapping[str, jax.ShapeDtypeStruct]
    train_step: jax.stages.Wrapped
    evaluation_step: jax.stages.Wrapped

    def initial_state(self, parameters: Any = None) -> TrainState:
        """The state at step 0, made in place on the mesh; the same numbers on any mesh.

        Args:
            parameters: arrays as ``state.parameters`` says, which are used up; None draws them.
        """

        def make(parameters: Any) -> TrainState:
            if parameters is None:
                _, parameters = split_model(LanguageModel(self.config.model, rngs=nnx.Rngs(self.config.seed)))
            return TrainState(
                step=jnp.zeros((), jnp.int32),
                parameters=parameters,
                optimizer=self.optimizer.init(parameters),
                ema=None if self.config.ema_decay is None else average_of(parameters),
            )

        state: TrainState = jax.jit(make, out_shardings=_layout(self.state), donate_argnums=0)(parameters)
        return state


def set_up(
    config: TrainConfig,
    devices: Sequence[jax.Device] | None = None,
    *,
    optimizer: optax.GradientTransformation | None = None,
    schedule: optax.Schedule | None = None,
) -> Setup:
    """Make what a run is made of; the model is traced, nothing is allocated or compiled.

    Args:
        config: the run.
        devices: the devices of the mesh, all of them; default ``jax.devices()``.
        optimizer: an optax transformation in place of the one that ``config.optimizer`` describes; see
            ``abstract_state`` for what it meets. What ``config.optimizer.groups`` freeze stays frozen.
        schedule: the learning rate of that optimizer, which the train step reports.

    Returns:
        The parts.

    Raises:
        ValueError: the mesh does not fit the devices, the sequences of a micro-batch do not divide over the mesh, the model
            refuses them, a parameter cannot be cut, see ``abstract_state``, or a group of ``config.optimizer`` has none.

    Examples:
        >>> mixer = MixerSpec(mixer="delta_net", options=(("num_heads", 2),))
        >>> model = ModelConfig(vocab_size=11, hidden_size=8, num_layers=1, pattern=(mixer,), intermediate_size=0)
        >>> config = TrainConfig(model=model, steps=2, batch_size=1, sequence_length=3)
        >>> setup = set_up(config, jax.devices()[:1])
        >>> row = np.ones((1, 1, 3), np.int32)
        >>> batch = {"inputs": row, "targets": row, "segment_ids": row, "mask": row.astype(np.float32)}
        >>> state, metrics = setup.train_step(setup.initial_state(), shard_batch(batch, setup.mesh))
        >>> int(state.step), float(metrics["tokens"])
        (1, 3.0)
    """
    mesh = make_mesh(config.mesh, devices)
    micro, parts = config.batch_size // config.gradient_accumulation, batch_parts(mesh)
    if micro % parts:
        raise ValueError(
            f"batch_size / gradient_accumulation is {micro}: wanted a multiple of the {parts} parts into "
            f"which the mesh cuts the batch (data={mesh.shape['data']} x fsdp={mesh.shape['fsdp']})"
        )
    if config.sequence_length % mesh.shape["sequence"]:
        raise ValueError(
            f"sequence_length is {config.sequence_length}: wanted a multiple of the {mesh.shape['sequence']} parts into "
            "which the mesh cuts the tokens of a sequence (mesh.sequence)"
        )
    rules = config.model.parameter_rules
    optimizer = optimizer or make_optimizer(config.optimizer, config.steps, rules)
    schedule = schedule or learning_rate_schedule(config.optimizer, config.steps)
    structure, parameters = abstract_model(config.model)
    frozen = frozen_mask(config.optimizer.groups, parameters)
    state = abstract_state(parameters, optimizer, mesh, rules, ema=config.ema_decay is not None)
    evaluation_step, evaluation_batch = make_evaluation_step(structure, mesh), _batch(1, micro, config, mesh)
    jax.eval_shape(evaluation_step, state.parameters, evaluation_batch)  # the first evaluation does not trace it again
    return Setup(
        config=config,
        mesh=mesh,
        structure=structure,
        optimizer=optimizer,
        state=state,
        batch=_batch(config.gradient_accumulation, micro, config, mesh),
        evaluation_batch=evaluation_batch,
        train_step=make_train_step(
            config.model,
            structure,
            _layout(state),
            optimizer,
            schedule,
            mesh,
            frozen=frozen if any(jax.tree.leaves(frozen)) else None,
            ema_decay=config.ema_decay,
        ),
        evaluation_step=evaluation_step,
    )


def _layout(state: TrainState) -> TrainState:
    """The shardings of a state."""
    layout: TrainState = jax.tree.map(lambda leaf: leaf.sharding, state)
    return layout


def _batch(number: int, size: int, config: TrainConfig, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    shape, sharding = (number, size, config.sequence_length), batch_sharding(mesh)
    dtypes = {"inputs": jnp.int32, "targets": jnp.int32, "segment_ids": jnp.int32, "mask": jnp.float32}
    return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for name, dtype in dtypes.items()}
