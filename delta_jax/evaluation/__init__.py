"""How well a language model predicts held-out text."""

from delta_jax.evaluation.perplexity import EvaluationResult, LogitsFunction, Measurement, evaluate, row_sums

__all__ = ["EvaluationResult", "LogitsFunction", "Measurement", "evaluate", "row_sums"]
