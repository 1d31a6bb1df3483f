"""Statistics that more than one task is held to."""

import numpy as np


def assert_uniform(values, possible):
    """All the possible values, and only they, within 4.5 standard errors of equal counts."""
    counts = np.array([(values == value).sum() for value in possible])
    expected = values.size / len(possible)
    assert counts.sum() == values.size
    assert np.abs(counts - expected).max() < 4.5 * np.sqrt(expected)
