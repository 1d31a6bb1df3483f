"""A few tokens are read where the caches lie: on a CPU nothing of all layers is copied, on a TPU the kernels see to it."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from delta_jax.inference.generate import _decode
from delta_jax.inference.sampling import Sampling
from delta_jax.models import LanguageModel, MixerSpec, ModelConfig
from delta_jax.parallel import MeshConfig, make_mesh
from delta_jax.testing.trials import interpreted_tpu


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


@pytest.mark.parametrize(
    ("mixer", "options"),
    [
        ("gated_delta_net", {"num_v_heads": 2, "conv_bias": True}),
        pytest.param("gated_delta_net_2", {}, marks=pytest.mark.slow),
        pytest.param("gated_delta_product", {"num_householder": 2, "expand_v": 1.0}, marks=pytest.mark.slow),
    ],
)
def test_the_kernels_of_a_tpu_read_a_few_tokens_as_the_definition_does(mixer, options):
    """One token, three, and two of which a row has none, by the kernels of a step and around it."""
    options = {"num_heads": 1, "head_dim": 64, "expand_v": 1.0} | options
    pattern = (MixerSpec(mixer=mixer, options=tuple(options.items())),)
    sizes = {"vocab_size": 16, "hidden_size": 128, "num_layers": 2, "intermediate_size": 0}
    model = LanguageModel(ModelConfig(pattern=pattern, dtype="float32", **sizes), rngs=nnx.Rngs(0))
    tokens = jax.random.randint(jax.random.key(0), (3, 10), 0, 16)
    mask = jnp.asarray([[True, True], [True, False], [False, False]])
    _, cache = model(tokens[:, :4], return_cache=True)

    def read(cache):
        found = []
        for start, stop, real in ((4, 5, None), (5, 8, None), (8, 10, mask)):
            logits, cache = model(tokens[:, start:stop], cache=cache, mask=real)
            found.append(logits)
        return found, cache

    want = jax.jit(read)(cache)
    with interpreted_tpu():
        text = str(jax.make_jaxpr(read)(cache))
        assert all(name in text for name in ("delta_rule_step", "short_convolution_step", "rms_norm_forward"))
        got = jax.jit(read)(cache)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), got, want)


def test_over_a_mesh_every_device_steps_its_own_sequences_and_heads():
    options = (("num_heads", 2), ("head_dim", 64), ("expand_v", 1.0))
    sizes = {"vocab_size": 16, "hidden_size": 128, "num_layers": 2, "intermediate_size": 0, "dtype": "float32"}
    config = ModelConfig(pattern=(MixerSpec(mixer="gated_delta_net", options=options),), **sizes)
    model = LanguageModel(config, rngs=nnx.Rngs(0))
    tokens = jax.random.randint(jax.random.key(0), (2, 5), 0, 16)
    _, cache = model(tokens[:, :4], return_cache=True)
    want = model(tokens[:, 4:], cache=cache)
    with interpreted_tpu(), jax.set_mesh(make_mesh(MeshConfig(data=2, tensor=2), jax.devices()[:4])):
        got = jax.jit(lambda cache: model(tokens[:, 4:], cache=cache))(cache)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), got, want)
