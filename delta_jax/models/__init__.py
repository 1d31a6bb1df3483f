"""Language models: a stack of mixers and feed-forward layers, described by a frozen configuration."""

from delta_jax.models.config import ExpertsConfig, MixerSpec, ModelConfig, PlacedMixer
from delta_jax.models.language_model import LanguageModel, ModelCache, number_of_parameters

__all__ = [
    "ExpertsConfig",
    "LanguageModel",
    "MixerSpec",
    "ModelCache",
    "ModelConfig",
    "PlacedMixer",
    "number_of_parameters",
]
