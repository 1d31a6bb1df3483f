"""Flax layers: the members of the delta-rule family, on one shared mixer, attention, and what a block needs besides."""

from delta_jax.layers.attention import Attention
from delta_jax.layers.cached_attention import AttentionCache, CachedAttention
from delta_jax.layers.delta_net import DeltaNet
from delta_jax.layers.gated_delta_net import GatedDeltaNet
from delta_jax.layers.latent_attention import LatentAttention
from delta_jax.layers.mixer import Mixer, MixerCache
from delta_jax.layers.mixture_of_experts import ExpertBias, MixtureOfExperts
from delta_jax.layers.mlp import SwiGLU
from delta_jax.layers.norm import RMSNorm, l2_normalize
from delta_jax.layers.token_mixer import TokenMixer

__all__ = [
    "MIXERS",
    "Attention",
    "AttentionCache",
    "CachedAttention",
    "DeltaNet",
    "ExpertBias",
    "GatedDeltaNet",
    "LatentAttention",
    "Mixer",
    "MixerCache",
    "MixtureOfExperts",
    "RMSNorm",
    "SwiGLU",
    "TokenMixer",
    "l2_normalize",
]

MIXERS: dict[str, type[TokenMixer]] = {
    "attention": Attention,
    "delta_net": DeltaNet,
    "gated_delta_net": GatedDeltaNet,
    "latent_attention": LatentAttention,
}
