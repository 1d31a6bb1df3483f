"""Training: configuration, state, step, loop, checkpoints and metrics."""

from delta_jax.training.checkpoint import Checkpoints, restore_model
from delta_jax.training.config import CheckpointConfig, OptimizerConfig, TrainConfig
from delta_jax.training.loop import NonFiniteLossError, TrainResult, train
from delta_jax.training.optimizer import (
    learning_rate_schedule,
    make_optimizer,
    muon_dimension_numbers,
    weight_decay_mask,
)
from delta_jax.training.state import TrainState, abstract_state, initial_state
from delta_jax.training.step import make_evaluation_step, make_train_step

__all__ = [
    "CheckpointConfig",
    "Checkpoints",
    "NonFiniteLossError",
    "OptimizerConfig",
    "TrainConfig",
    "TrainResult",
    "TrainState",
    "abstract_state",
    "initial_state",
    "learning_rate_schedule",
    "make_evaluation_step",
    "make_optimizer",
    "make_train_step",
    "muon_dimension_numbers",
    "restore_model",
    "train",
    "weight_decay_mask",
]
