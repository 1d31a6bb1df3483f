"""Flax layers: the members of the delta-rule family, on one shared mixer, attention, and what a block needs besides."""

from delta_jax.layers.attention import Attention
from delta_jax.layers.cached_attention import AttentionCache, CachedAttention
from delta_jax.layers.delta_net import DeltaNet
from delta_jax.layers.delta_product import DeltaProduct, GatedDeltaProduct
from delta_jax.layers.gated_delta_net import GatedDeltaNet
from delta_jax.layers.gated_delta_net_2 import GatedDeltaNet2
from delta_jax.layers.gated_linear_attention import GatedLinearAttention
from delta_jax.layers.kaczmarz import KaczmarzLinearAttention
from delta_jax.layers.kimi_delta_attention import KimiDeltaAttention
from delta_jax.layers.latent_attention import LatentAttention
from delta_jax.layers.linear_attention import LinearAttention, RetNet
from delta_jax.layers.mamba2 import Mamba2
from delta_jax.layers.mixer import Mixer, MixerCache
from delta_jax.layers.mixture_of_experts import ExpertBias, MixtureOfExperts
from delta_jax.layers.mlp import SwiGLU
from delta_jax.layers.norm import RMSNorm, l2_normalize
from delta_jax.layers.registry import MIXERS, find_mixer, mixer_options
from delta_jax.layers.rope_scaling import RopeScaling
from delta_jax.layers.token_mixer import TokenMixer

__all__ = [
    "MIXERS",
    "Attention",
    "AttentionCache",
    "CachedAttention",
    "DeltaNet",
    "DeltaProduct",
    "ExpertBias",
    "GatedDeltaNet",
    "GatedDeltaNet2",
    "GatedDeltaProduct",
    "GatedLinearAttention",
    "KaczmarzLinearAttention",
    "KimiDeltaAttention",
    "LatentAttention",
    "LinearAttention",
    "Mamba2",
    "Mixer",
    "MixerCache",
    "MixtureOfExperts",
    "RMSNorm",
    "RetNet",
    "RopeScaling",
    "SwiGLU",
    "TokenMixer",
    "find_mixer",
    "l2_normalize",
    "mixer_options",
]
