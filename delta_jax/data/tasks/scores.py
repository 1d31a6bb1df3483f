"""The metrics of the benchmarks, from predictions in numpy."""

import numpy as np

from delta_jax.data.tasks.examples import IGNORED, Examples

__all__ = [
    "cumulative_accuracy",
    "macro_accuracy",
    "right",
    "scaled_accuracy",
    "sequence_accuracy",
    "token_accuracy",
    "voted",
]


def right(examples: Examples, predictions: np.ndarray) -> np.ndarray:
    """[n, T] float: 1 where a prediction [n, T] counts as right, 0 where not, NaN where nothing is asked."""
    if examples.legal is None:
        hits = predictions == examples.targets
    else:
        hits = np.take_along_axis(examples.legal, predictions[..., None], axis=-1)[..., 0]
    return np.where(examples.targets == IGNORED, np.nan, hits.astype(np.float64))


def token_accuracy(hits: np.ndarray) -> float:
    """Mean over the answers of a sequence, then over sequences; `hits` as from `right`."""
    return float(np.mean(np.nanmean(hits, axis=1)))


def sequence_accuracy(hits: np.ndarray) -> float:
    """Share of sequences of which every answer is right."""
    return float(np.mean(np.nanmin(hits, axis=1)))


def cumulative_accuracy(hits: np.ndarray) -> np.ndarray:
    """[T]: the share of sequences whose answers at positions 0 to t are all right."""
    return np.mean(np.minimum.accumulate(np.nan_to_num(hits, nan=1.0), axis=1), axis=0)


def macro_accuracy(examples: Examples, hits: np.ndarray) -> float:
    """Mean over the classes that occur among the targets of the share that is right (MAD's metric)."""
    asked = examples.targets != IGNORED
    classes, place = np.unique(examples.targets[asked], return_inverse=True)
    return float(np.mean(np.bincount(place, hits[asked]) / np.bincount(place, minlength=len(classes))))


def scaled_accuracy(accuracy: float, chance: float) -> float:
    """`(accuracy - chance) / (1 - chance)`: guessing is 0, perfect is 1."""
    return (accuracy - chance) / (1 - chance)


def voted(
    answers: np.ndarray, targets: np.ndarray, probabilities: np.ndarray, number: int
) -> tuple[np.ndarray, np.ndarray]:
    """One prediction for each answer that several positions give together.

    Args:
        answers: [n, T] int, see `Examples.answers`.
        targets: [n, T] int, equal on all positions of an answer; `IGNORED` positions have no vote.
        probabilities: [n, T, vocab].
        number: answers of a sequence at most, A.

    Returns:
        targets and predictions, [n, A] each; answers that a sequence lacks have the target `IGNORED`.
    """
    rows, places = np.nonzero(targets != IGNORED)
    votes = np.zeros((len(targets), number, probabilities.shape[-1]), probabilities.dtype)
    np.add.at(votes, (rows, answers[rows, places]), probabilities[rows, places])
    wanted = np.full((len(targets), number), IGNORED, targets.dtype)
    wanted[rows, answers[rows, places]] = targets[rows, places]
    return wanted, votes.argmax(axis=-1)
