"""Recall tasks so small that train and test would meet at once, were they not kept apart by what a sequence is."""

import pytest

from delta_jax.data.tasks import (
    MQAR,
    Compression,
    FuzzyRecall,
    InContextRecall,
    Memorization,
    MultiQueryRecall,
    NoisyRecall,
    Palindrome,
    SelectiveCopying,
    Stacks,
)
from delta_jax.data.tasks.examples import draw


@pytest.mark.parametrize(
    "task",
    [
        Compression(vocab_size=5, length=6),
        FuzzyRecall(vocab_size=7, length=8, key_size=1, value_size=1),
        InContextRecall(vocab_size=6, length=8),
        MQAR(vocab_size=10, length=8, pairs=2, random_non_queries=False),
        MQAR(vocab_size=8, length=8, pairs=1, updates=1, filler_tokens=3),
        Memorization(vocab_size=9, length=8),
        MultiQueryRecall(pairs=2, queries=1, vocab_size=10),
        NoisyRecall(vocab_size=6, noise_tokens=2, length=6),
        Palindrome(length=6, vocab_size=9),
        SelectiveCopying(length=8, copies=2, vocab_size=7),
        Stacks(operations=3, stacks=2, elements=3),
    ],
    ids=repr,
)
def test_splits_of_few_sequences_never_meet(task):
    train, test = (draw(task, 4000, split=split, seed=0).inputs for split in ("train", "test"))
    kinds = [{row.tobytes() for row in rows} for rows in (train, test)]
    assert not kinds[0] & kinds[1]
    assert len(kinds[1]) > 1 and len(kinds[0]) < len(train)  # repeats within each: the space is exhausted
    assert 4 < len(kinds[0]) / len(kinds[1]) < 60


def test_a_split_without_sequences():
    with pytest.raises(ValueError) as error:
        draw(Compression(vocab_size=3, length=2), 100, split="test", seed=0)
    assert "too few sequences" in str(error.value)
