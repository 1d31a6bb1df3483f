"""Text generation in constant memory."""

from delta_jax.inference.generate import generate
from delta_jax.inference.sampling import Sampling, keep_top_k, keep_top_p, sample

__all__ = ["Sampling", "generate", "keep_top_k", "keep_top_p", "sample"]
