"""What every synthetic task promises, checked against an oracle that reads the inputs alone."""

import numpy as np

from delta_jax.data.tasks.examples import IGNORED, draw, identities
from delta_jax.data.tasks.scores import right, token_accuracy


def check_promises(task, oracle, guesses, *, all_targets=True, number=256):
    """Shapes, an oracle at 1.0, guesses at `chance`, splits that never meet, seeds.

    Args:
        task: the task.
        oracle: (task, one row of inputs) -> the row of targets, IGNORED where nothing is asked; a plain loop.
        guesses: a range of possible answers, or (rng, examples) -> predictions.
        all_targets: the oracle also knows where nothing is asked.
        number: of sequences.
    """
    examples = draw(task, number, split="test", seed=3)
    inputs, targets = examples.inputs, examples.targets
    assert inputs.shape == targets.shape == (number, task.length)
    assert inputs.dtype == targets.dtype == np.int32
    assert inputs.min() >= 0 and inputs.max() < task.vocab_size and targets.max() < task.vocab_size
    assert targets.min() >= IGNORED and (targets != IGNORED).any(axis=1).all()

    known = np.array([oracle(task, row) for row in inputs])
    assert token_accuracy(right(examples, known)) == 1.0
    if all_targets:
        np.testing.assert_array_equal(known, targets)

    rng, repeats = np.random.default_rng(5), 40
    if isinstance(guesses, range):
        assert set(np.unique(targets[targets != IGNORED])) <= set(guesses)
        made = [rng.integers(guesses.start, guesses.stop, targets.shape) for _ in range(repeats)]
    else:
        made = [guesses(rng, examples) for _ in range(repeats)]
    scores = np.array([token_accuracy(right(examples, answers)) for answers in made])
    error = scores.std() / repeats**0.5
    assert 0 < error < 0.02 and abs(scores.mean() - task.chance) < 4 * error

    again = draw(task, number, split="test", seed=3)
    for one, other in zip(examples, again, strict=True):
        np.testing.assert_array_equal(one, other)
    assert not np.array_equal(inputs, draw(task, number, split="test", seed=4).inputs)

    # The same seed on both sides: only the identity keeps them apart.
    train = draw(task, 8 * number, split="train", seed=3)
    assert not set(identities(train)) & set(identities(examples))
    assert not {row.tobytes() for row in train.inputs} & {row.tobytes() for row in inputs}


def close(counts, shares, sigmas=4.5):
    """Counts that come from these shares of their sum, each within `sigmas` standard deviations."""
    counts, shares = np.asarray(counts), np.asarray(shares)
    spread = np.sqrt(counts.sum() * shares * (1 - shares))
    return bool((np.abs(counts - counts.sum() * shares) <= sigmas * spread + 1e-9).all())
