"""Language models: a stack of mixers and feed-forward layers, described by a frozen configuration."""

from delta_jax.models.config import ExpertsConfig, LayerOverride, MixerSpec, ModelConfig
from delta_jax.models.language_model import LanguageModel, ModelCache, number_of_parameters

__all__ = [
    "ExpertsConfig",
    "LanguageModel",
    "LayerOverride",
    "MixerSpec",
    "ModelCache",
    "ModelConfig",
    "number_of_parameters",
]
