"""Training: configuration, state, step, loop, checkpoints and metrics."""

from delta_jax.training.checkpoint import Checkpoints, restore_model
from delta_jax.training.config import CheckpointConfig, OptimizerConfig, ParameterGroup, TrainConfig
from delta_jax.training.loop import NonFiniteLossError, TrainResult, train
from delta_jax.training.optimizer import (
    learning_rate_schedule,
    make_optimizer,
    muon_dimension_numbers,
    weight_decay_mask,
)
from delta_jax.training.setup import Setup, set_up
from delta_jax.training.state import TrainState

__all__ = [
    "CheckpointConfig",
    "Checkpoints",
    "NonFiniteLossError",
    "OptimizerConfig",
    "ParameterGroup",
    "Setup",
    "TrainConfig",
    "TrainResult",
    "TrainState",
    "learning_rate_schedule",
    "make_optimizer",
    "muon_dimension_numbers",
    "restore_model",
    "set_up",
    "train",
    "weight_decay_mask",
]
