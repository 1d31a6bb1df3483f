"""Weights are cast to what products take once, not for every block of tokens, and it changes nothing."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from delta_jax.inference import generate
from delta_jax.inference.weights import in_compute_dtype
from delta_jax.models import ExpertsConfig, LanguageModel, MixerSpec, ModelConfig
from tests.inference.conftest import VOCAB, make


def test_the_loop_is_given_weights_that_are_cast(monkeypatch):
    model, module, given = make("gated_delta_net", dtype="bfloat16"), importlib.import_module(generate.__module__), []
    decode = module._decode
    monkeypatch.setattr(module, "_decode", lambda model, *rest: given.append(model) or decode(model, *rest))
    generate(model, [[3, 1]], max_new_tokens=2)
    assert given[0].blocks[0].mixer.q_proj.kernel.dtype == jnp.bfloat16
    assert model.blocks[0].mixer.q_proj.kernel.dtype == jnp.float32


def test_weights_that_are_cast_beforehand_change_no_bit():
    options, more = (
        (("num_heads", 2), ("head_dim", 4)),
        {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24},
    )
    names = ("gated_delta_net", "attention")
    experts = ExpertsConfig(num_experts=4, num_experts_per_token=2, expert_size=8, shared_expert_size=8)
    config = ModelConfig(
        num_layers=2,
        pattern=tuple(MixerSpec(mixer=name, options=options) for name in names),
        experts=experts,
        tie_embeddings=True,
        dtype="bfloat16",
        **more,
    )
    model = LanguageModel(config, rngs=nnx.Rngs(0))
    narrow = in_compute_dtype(model)
    run = jax.jit(lambda model: model(jnp.arange(6, dtype=jnp.int32)[None], return_cache=True))
    jax.tree.map(np.testing.assert_array_equal, run(narrow), run(model))
    kinds = {"/".join(map(str, path)): x.dtype for path, x in nnx.to_flat_state(nnx.state(narrow))}
    cast = {path for path, dtype in kinds.items() if dtype == jnp.bfloat16}
    assert {"embed/embedding", "blocks/0/mlp/experts/up_proj", "blocks/1/mixer/q_proj/kernel"} <= cast
    assert {"blocks/0/mixer/A_log", "blocks/0/mixer/q_conv/kernel", "blocks/0/mlp/router/kernel"} <= kinds.keys() - cast
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(nnx.state(model)))
