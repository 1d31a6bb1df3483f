"""Text generation in constant memory."""

from delta_jax.inference.completions import Completion, complete
from delta_jax.inference.generate import Options, generate, stream
from delta_jax.inference.prefix import load_prefix, save_prefix
from delta_jax.inference.reading import Reading, Scored, log_probabilities, read_prompts, take_rows
from delta_jax.inference.sampling import Sampling, keep_min_p, keep_top_k, keep_top_p, penalize, sample
from delta_jax.inference.text import Detokenizer, Piece

__all__ = [
    "Completion",
    "Detokenizer",
    "Options",
    "Piece",
    "Reading",
    "Sampling",
    "Scored",
    "complete",
    "generate",
    "keep_min_p",
    "keep_top_k",
    "keep_top_p",
    "load_prefix",
    "log_probabilities",
    "penalize",
    "read_prompts",
    "sample",
    "save_prefix",
    "stream",
    "take_rows",
]
