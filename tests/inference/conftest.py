"""Tiny models, made once, and a tokenizer whose tokens are syllables."""

import functools

import numpy as np
import pytest
from flax import nnx

from delta_jax.models import LanguageModel, MixerSpec, ModelConfig

VOCAB = 40


@functools.cache
def make(*names, dtype="float32", seed=2):
    options = (("num_heads", 2), ("head_dim", 4))
    config = ModelConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        num_layers=2 * len(names),
        pattern=tuple(MixerSpec(mixer=name, options=options) for name in names),
        intermediate_size=24,
        initializer_std=0.4,
        dtype=dtype,
    )
    return LanguageModel(config, rngs=nnx.Rngs(seed))


class Syllables:
    """Every token is a consonant and a vowel; 39 is silent."""

    vocab_size, document_id = VOCAB, VOCAB - 1

    def encode(self, text):
        return np.array(
            ["bdfgklmn".index(c) * 5 + "aeiou".index(v) for c, v in zip(text[::2], text[1::2], strict=True)]
        )

    def encode_with_bytes(self, text):
        return self.encode(text), np.full(len(text) // 2, 2)

    def decode(self, ids):
        return "".join("bdfgklmn"[i // 5] + "aeiou"[i % 5] for i in map(int, ids) if i != self.document_id)


@pytest.fixture(scope="session")
def model():
    return make("delta_net", "gated_delta_net")


@pytest.fixture(scope="session")
def syllables():
    return Syllables()
