"""How well a language model predicts held-out text."""

from delta_jax.evaluation.perplexity import EvaluationResult, LogitsFunction, evaluate

__all__ = ["EvaluationResult", "LogitsFunction", "evaluate"]
