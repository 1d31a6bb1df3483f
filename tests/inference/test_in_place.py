"""The decode loop on a CPU never copies the caches of all layers."""

import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from delta_jax.inference.generate import _decode
from delta_jax.inference.sampling import Sampling
from delta_jax.models import LanguageModel, MixerSpec, ModelConfig


@pytest.mark.parametrize("mixer", ["gated_delta_net", "attention"])
def test_no_cache_is_copied_for_a_token(mixer):
    pattern = (MixerSpec(mixer=mixer, options=(("num_heads", 2),)),)
    sizes = {"vocab_size": 8, "hidden_size": 64, "num_layers": 5, "intermediate_size": 0}
    model = LanguageModel(ModelConfig(pattern=pattern, dtype="float32", **sizes), rngs=nnx.Rngs(0))
    cache = model.init_cache(3, length=128)
    large = max(jax.tree.leaves(cache), key=lambda x: x.size).shape
    assert large[:2] == (5, 3)
    keys, stops = jax.random.split(jax.random.key(0), 3), jnp.zeros((8,), bool)
    seen, stopped, where = jnp.zeros((3, 8), bool), jnp.zeros((3,), bool), jnp.zeros((2,), jnp.int32)
    given = jnp.zeros((3, 8)), cache, seen, stopped, keys, Sampling().numbers(), stops, where
    text = _decode.lower(model, *given).compile().as_text()
    shape = re.escape(f"f32[{','.join(map(str, large))}]")
    assert re.search(rf"= {shape}", text)
    assert not re.findall(rf"= {shape}\S* (?:copy|broadcast)\(.*", text)
