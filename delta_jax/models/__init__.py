"""Language models: a stack of mixers and SwiGLU layers, described by a frozen configuration."""

from delta_jax.models.config import MixerSpec, ModelConfig
from delta_jax.models.language_model import LanguageModel, ModelCache, number_of_parameters

__all__ = ["LanguageModel", "MixerSpec", "ModelCache", "ModelConfig", "number_of_parameters"]
