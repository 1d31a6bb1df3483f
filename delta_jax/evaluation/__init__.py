"""How well a language model predicts text: held-out corpora, and the answers of tasks."""

from delta_jax.evaluation.perplexity import EvaluationResult, LogitsFunction, Measurement, evaluate, row_sums
from delta_jax.evaluation.scoring import Score, score

__all__ = ["EvaluationResult", "LogitsFunction", "Measurement", "Score", "evaluate", "row_sums", "score"]
