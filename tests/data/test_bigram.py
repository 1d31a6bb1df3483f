"""The byte-bigram baseline against a direct computation."""

import json
import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from delta_jax.data import DataConfig, bigram_bits_per_byte, split


def by_hand(config, alpha):
    pairs, firsts = Counter(), Counter()
    training, validation = split(config)
    for index in range(len(training)):
        symbols = [256, *training[index].encode(), 256]
        pairs.update(pairwise(symbols))
        firsts.update(symbols[:-1])
    bits, length = 0.0, 0
    for index in range(len(validation)):
        text = validation[index].encode()
        symbols, length = [256, *text, 256], length + len(text)
        for pair in pairwise(symbols):
            bits -= math.log2((pairs[pair] + alpha) / (firsts[pair[0]] + 257 * alpha))
    return bits / length


def test_equals_the_definition_at_some_alpha_and_is_near_its_best(tmp_path):
    generator = np.random.default_rng(0)
    words = ["delta", "rule", "state", "\u00fcber", " ", "\n"]
    lines = [json.dumps({"text": "".join(generator.choice(words, size=40))}) for _ in range(60)]
    (tmp_path / "c.jsonl").write_text("\n".join(lines))
    config = DataConfig(path=str(tmp_path / "c.jsonl"), validation_fraction=0.2)
    measured = bigram_bits_per_byte(config)
    candidates = [by_hand(config, alpha) for alpha in np.geomspace(1e-4, 10.0, 26)]
    assert min(abs(measured - value) for value in candidates) < 1e-12
    assert measured < min(candidates) + 0.01


def test_documents_of_one_byte_count_their_boundary_and_empty_ones_nothing(tmp_path):
    texts = [*"abcdefghij", *[""] * 10, "aa"]
    (tmp_path / "c.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    config = DataConfig(path=str(tmp_path / "c.jsonl"), validation_fraction=0.5)
    assert sorted(part[index] for part in split(config) for index in range(len(part))) == sorted(filter(None, texts))
    candidates = [by_hand(config, alpha) for alpha in np.geomspace(1e-4, 10.0, 26)]
    assert min(abs(bigram_bits_per_byte(config) - value) for value in candidates) < 1e-12


def test_counting_stops_at_the_limit(tmp_path):
    (tmp_path / "c.jsonl").write_text("\n".join(json.dumps({"text": "ab" * (600_000 + number)}) for number in range(4)))
    config = DataConfig(path=str(tmp_path / "c.jsonl"), validation_fraction=0.5)
    whole, part = bigram_bits_per_byte(config), bigram_bits_per_byte(config, training_bytes=1)
    assert whole == pytest.approx(0.0, abs=1e-4)
    assert part > whole


def test_embedded_corpus():
    assert 3.0 < bigram_bits_per_byte(DataConfig()) < 4.2
