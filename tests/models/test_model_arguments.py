"""What people pass to a model and its configuration: one sentence that names the argument, or the right value."""

import copy
import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from delta_jax.models import ExpertsConfig, LanguageModel, LayerOverride, MixerSpec, ModelConfig

SPEC = MixerSpec(mixer="delta_net", options=(("num_heads", 2),))
PLACED = LayerOverride(mixer="attention", options=(("num_heads", 2),), layers=(1,))
SETTINGS = {
    "vocab_size": 11,
    "hidden_size": 16,
    "num_layers": 2,
    "pattern": (SPEC,),
    "layer_overrides": (PLACED,),
    "intermediate_size": 8,
    "experts": ExpertsConfig(expert_size=4, num_experts=3, num_experts_per_token=2),
    "dense_layers": (0,),
}
TOKENS = jnp.zeros((2, 5), jnp.int32)

pytestmark = pytest.mark.usefixtures("as_users_call")


@functools.cache
def make():
    return LanguageModel(ModelConfig(**SETTINGS), rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pattern": ("delta_net",)}, r"pattern must hold MixerSpec\(mixer=...\), got 'delta_net'"),
        ({"pattern": "delta_net"}, "pattern must be a tuple of MixerSpec, got 'delta_net'"),
        ({"pattern": [SPEC]}, "pattern must be a tuple of MixerSpec"),
        ({"pattern": (PLACED,)}, "pattern must hold MixerSpec"),
        ({"layer_overrides": (SPEC,)}, "layer_overrides must hold LayerOverride"),
        ({"experts": {"size": 4}}, "experts must be an ExpertsConfig or None, got {'size': 4}"),
        ({"vocab_size": None}, "vocab_size must be a positive integer, got None"),
        ({"num_layers": True}, "num_layers must be a positive integer, got True"),
        ({"intermediate_size": False}, "intermediate_size must be a positive integer or 0, got False"),
        ({"dense_layers": (True,)}, "dense_layers must be a tuple of integers, got .True,."),
        ({"dense_layers": 1}, "dense_layers must be a tuple of integers, got 1"),
        ({"tie_embeddings": "no"}, "tie_embeddings must be true or false, got 'no'"),
        ({"zero_centered_norms": 1}, "zero_centered_norms must be true or false, got 1"),
        ({"dtype": "bf16"}, "dtype must be one of float32, bfloat16, float16, got 'bf16'"),
    ],
)
def test_impossible_configurations_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**(SETTINGS | change))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            lambda: MixerSpec(mixer="delta_net", options={"num_heads": 2}),
            "options .* must be a tuple of .name, value. pairs",
        ),
        (
            lambda: MixerSpec(mixer="delta_net", options=("num_heads", 2)),
            "options .* must be a tuple of .name, value. pairs",
        ),
        (lambda: MixerSpec(mixer="delta_net", options=(("num_heads", [2]),)), "num_heads: wanted an integer, got"),
        (lambda: MixerSpec(mixer=["delta_net"]), "mixer must be one of attention, "),
        (lambda: LayerOverride(mixer="delta_net", layers=1), "layers must be a tuple of integers, got 1"),
        (lambda: LayerOverride(mixer="delta_net", layers=(True,)), "layers must be a tuple of integers"),
        (
            lambda: MixerSpec(mixer="delta_net", norm_placement=None),
            "norm_placement must be one of pre, post, got None",
        ),
        (lambda: LayerOverride(mixer="delta", layers=(1,)), "mixer must be one of attention, "),
        (
            lambda: ExpertsConfig(expert_size=4, num_experts=3, num_experts_per_token=2, balance_rate=True),
            "balance_rate must be a positive number",
        ),
        (lambda: LanguageModel(SETTINGS, rngs=nnx.Rngs(0)), "config must be a ModelConfig, got dict"),
        (lambda: LanguageModel(ModelConfig(**SETTINGS), rngs=jax.random.key(0)), "rngs must be nnx.Rngs"),
    ],
)
def test_impossible_entries_are_named(entry, message):
    with pytest.raises(ValueError, match=message):
        entry()


def other_cache():
    cache = make().init_cache(2, length=9)
    return cache[::-1]


BAD = {
    "tokens must be an array, as jnp.asarray makes one, got list": {"tokens": [[1, 2]]},
    "tokens must be integers [batch, time], or weights [batch, time, n] over the first n of 11 tokens, got shape (5,)": {
        "tokens": TOKENS[0]
    },
    "n of 11 tokens, got shape (2, 5) and dtype float32": {"tokens": jnp.zeros((2, 5))},
    "n of 11 tokens, got shape (2, 5, 12) and dtype float32": {"tokens": jnp.zeros((2, 5, 12))},
    "n of 11 tokens, got shape (2, 5) and dtype bool": {"tokens": jnp.zeros((2, 5), bool)},
    "tokens must hold at least one token, got shape (2, 0)": {"tokens": TOKENS[:, :0]},
    "segment_ids must be integers": {"segment_ids": jnp.zeros((2, 5))},
    "segment_ids must have shape [batch=2, time=5], got shape (5,)": {"segment_ids": TOKENS[0]},
    "cache must be one of this layer's for 2 sequences": {"cache": lambda: make().init_cache(3, length=9)},
    "cache must be one of this layer's for 2 sequences, as init_cache makes it, got tuple": {"cache": other_cache},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    change = {name: x() if callable(x) else x for name, x in BAD[message].items()}
    with pytest.raises(ValueError) as error:
        make()(**({"tokens": TOKENS} | change))
    assert message in str(error.value)


def test_other_calls():
    with pytest.raises(ValueError, match="batch_size must be a positive integer, got 0"):
        make().init_cache(0, length=3)
    with pytest.raises(ValueError, match="length must be a positive integer, got '9'"):
        make().extend_cache(make().init_cache(2, length=3), "9")
    with pytest.raises(ValueError, match=r"x must have shape \[..., hidden_size=16\], got shape \(3,\)"):
        make().head(jnp.ones(3))


def test_tabulate_and_calls_after_it():
    model, tables, wide = make(), [], {"console_kwargs": {"width": 300}}
    jax.eval_shape(lambda tokens: tables.append(nnx.tabulate(model, tokens, segment_ids=tokens, **wide)), TOKENS)
    assert "LanguageModel" in tables[0]
    assert "blocks/0/mixer/o_proj" in tables[0]
    assert jax.eval_shape(model, TOKENS).shape == (2, 5, 11)


def test_copies():
    model = make()
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert nnx.graphdef(other) == nnx.graphdef(model)
        jax.tree.map(np.testing.assert_array_equal, nnx.state(other), nnx.state(model))


def test_axes_that_are_symbolic():
    axes = jax.export.symbolic_shape("b, t")
    exported = jax.export.export(jax.jit(lambda tokens: make()(tokens)))(jax.ShapeDtypeStruct(axes, jnp.int32))
    assert exported.out_avals[0].shape == (*axes, 11)
