"""Flax layers: the members of the delta-rule family, on one shared mixer, and what a block needs besides."""

from delta_jax.layers.delta_net import DeltaNet
from delta_jax.layers.gated_delta_net import GatedDeltaNet
from delta_jax.layers.mixer import Mixer, MixerCache
from delta_jax.layers.mlp import SwiGLU
from delta_jax.layers.norm import RMSNorm, l2_normalize

__all__ = ["MIXERS", "DeltaNet", "GatedDeltaNet", "Mixer", "MixerCache", "RMSNorm", "SwiGLU", "l2_normalize"]

MIXERS: dict[str, type[Mixer]] = {
    "delta_net": DeltaNet,
    "gated_delta_net": GatedDeltaNet,
}
