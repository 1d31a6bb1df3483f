"""What people pass to a layer: the right value, or one sentence that names the argument; and what Python does to layers."""

import copy
import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from delta_jax.layers import (
    MIXERS,
    Attention,
    DeltaNet,
    LatentAttention,
    MixtureOfExperts,
    RMSNorm,
    SwiGLU,
    l2_normalize,
)

HIDDEN = 16
SMALL = {name: {"num_heads": 2, "head_dim": 8} for name in MIXERS} | {
    "latent_attention": {
        "num_heads": 2,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
    }
}
OTHERS = {
    "experts of a sigmoid": lambda: MixtureOfExperts(
        HIDDEN, expert_size=4, num_experts=3, num_experts_per_token=2, rngs=nnx.Rngs(0)
    ),
    "experts of a softmax": lambda: MixtureOfExperts(
        HIDDEN,
        expert_size=4,
        num_experts=3,
        num_experts_per_token=2,
        shared_expert_size=4,
        use_shared_expert_gate=True,
        router="softmax",
        rngs=nnx.Rngs(0),
    ),
    "mlp": lambda: SwiGLU(HIDDEN, 8, rngs=nnx.Rngs(0)),
    "norm": lambda: RMSNorm(HIDDEN),
}
X, IDS = jnp.ones((2, 5, HIDDEN)), jnp.zeros((2, 5), jnp.int32)

pytestmark = pytest.mark.usefixtures("as_users_call")
members = pytest.mark.parametrize("name", MIXERS)


@functools.cache
def make(name):
    return OTHERS[name]() if name in OTHERS else MIXERS[name](HIDDEN, **SMALL[name], rngs=nnx.Rngs(0))


BAD = {
    "x must be an array, as jnp.asarray makes one, got list": {"x": X.tolist()},
    "x must have shape [batch, time, hidden_size=16], got shape (5, 16)": {"x": X[0]},
    "x must have shape [batch, time, hidden_size=16], got shape (2, 5, 8)": {"x": X[..., :8]},
    "x must have one of the dtypes float32, bfloat16, float16, float64, got int32": {"x": X.astype(jnp.int32)},
    "x must hold at least one token": {"x": X[:, :0]},
    "segment_ids must be integers": {"segment_ids": jnp.zeros((2, 5))},
    "segment_ids must have shape [batch=2, time=5], got shape (5,)": {"segment_ids": IDS[0]},
    "segment_ids must be an array": {"segment_ids": [[0] * 5] * 2},
}


@members
def test_bad_input_is_named(name):
    for message, change in BAD.items():
        with pytest.raises(ValueError) as error:
            make(name)(**({"x": X} | change))
        assert message in str(error.value)


@members
def test_a_cache_of_another_kind_is_named(name):
    layer = make(name)
    other = make("delta_net" if name in ("attention", "latent_attention", "linear_attention") else "attention")
    wrong = {
        "of this layer's for 2 sequences, as init_cache makes it, got ": layer.init_cache(3, length=5),
        " arrays where ": other.init_cache(2, length=5),
        "got str of": "cache",
        "and dtype float16 where": jax.tree.map(lambda a: a.astype(jnp.float16), layer.init_cache(2, length=5)),
    }
    for message, cache in wrong.items():
        with pytest.raises(ValueError) as error:
            layer(X, cache=cache)
        assert message in str(error.value)
    for size in (0, True, 2.0, None):
        with pytest.raises(ValueError, match="batch_size must be a positive integer, got"):
            layer.init_cache(size, length=5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "bf16"}, "dtype must be one of the dtypes float32, bfloat16, float16, float64, got 'bf16'"),
        ({"dtype": None}, "dtype must be one of the dtypes"),
        ({"param_dtype": jnp.int8}, "param_dtype must be one of the dtypes"),
        ({"rngs": 0}, r"rngs must be nnx.Rngs, such as nnx.Rngs\(0\), got int"),
        ({"initializer_std": True}, "initializer_std must be a positive number, got True"),
        ({"initializer_std": float("inf")}, "initializer_std must be a positive number, got inf"),
        ({"hidden_size": None}, "hidden_size must be a positive integer, got None"),
        ({"hidden_size": "16"}, "hidden_size must be a positive integer, got '16'"),
    ],
)
@pytest.mark.parametrize("name", [*MIXERS, "experts", "mlp"])
def test_impossible_options_are_named(name, change, message):
    kinds = MIXERS | {
        "experts": functools.partial(MixtureOfExperts, expert_size=4, num_experts=3, num_experts_per_token=2),
        "mlp": functools.partial(SwiGLU, intermediate_size=4),
    }
    options = {"hidden_size": HIDDEN, "rngs": nnx.Rngs(0)} | SMALL.get(name, {}) | change
    with pytest.raises(ValueError, match=message):
        kinds[name](**options)


ONCE = {
    "gate_lower_bound must be a negative number or None, got -inf": lambda: MIXERS["kimi_delta_attention"](
        HIDDEN, gate_lower_bound=float("-inf"), rngs=nnx.Rngs(0)
    ),
    "chunk_size must be 16, 32, 64 or 128, got 24": lambda: DeltaNet(HIDDEN, chunk_size=24, rngs=nnx.Rngs(0)),
    "num_heads must be a positive integer, got None": lambda: Attention(HIDDEN, num_heads=None, rngs=nnx.Rngs(0)),
    "kv_lora_rank must be a positive integer, got True": lambda: LatentAttention(
        HIDDEN, kv_lora_rank=True, rngs=nnx.Rngs(0)
    ),
    "shared_expert_size must be a positive integer or 0, got False": lambda: MixtureOfExperts(
        HIDDEN, expert_size=4, num_experts=3, num_experts_per_token=2, shared_expert_size=False, rngs=nnx.Rngs(0)
    ),
    "size must be a positive integer, got 2.0": lambda: RMSNorm(2.0),
    "eps must be a positive number, got True": lambda: RMSNorm(2, eps=True),
    "groups must divide size, got 3 and 4": lambda: RMSNorm(4, groups=3),
    "eps must be a positive number, got 0": lambda: l2_normalize(X, eps=0),
    "x must have shape [..., size], got shape ()": lambda: l2_normalize(jnp.ones(())),
    "x must have one of the dtypes": lambda: l2_normalize(IDS),
    "x must have shape [..., size=16], got shape (2, 5)": lambda: make("norm")(jnp.ones((2, 5))),
    "x must have shape [..., hidden_size=16], got shape (2, 8)": lambda: make("mlp")(jnp.ones((2, 8))),
    "x must have shape [batch, time, hidden_size=16], got shape (5, 16)": lambda: make("experts of a softmax")(X[0]),
    "x must be an array, as jnp.asarray makes one, got list": lambda: make("mlp")([1.0] * HIDDEN),
}


@pytest.mark.parametrize("message", ONCE)
def test_other_mistakes_are_named(message):
    with pytest.raises(ValueError) as error:
        ONCE[message]()
    assert message in str(error.value)


@pytest.mark.parametrize("dtype", ["bfloat16", jnp.bfloat16, np.dtype(jnp.bfloat16)])
def test_whatever_names_a_dtype(dtype):
    layer = DeltaNet(HIDDEN, dtype=dtype, rngs=nnx.Rngs(0))
    assert jax.eval_shape(layer, X).dtype == jnp.bfloat16
    assert (
        jax.eval_shape(lambda: layer(np.ones((2, 5, HIDDEN)), segment_ids=np.zeros((2, 5), np.int64))).shape == X.shape
    )


@members
def test_tabulate_and_calls_after_it(name):
    layer, tables, wide = make(name), [], {"console_kwargs": {"width": 300}}

    def tabulate(x, ids):
        tables.append(nnx.tabulate(layer, x, **wide))
        tables.append(nnx.tabulate(layer, x, segment_ids=ids, cache=layer.init_cache(2, length=9), **wide))

    jax.eval_shape(tabulate, X, IDS)  # as it would be run, but nothing is compiled
    assert all("o_proj" in table and "[2,5,16]" in table for table in tables)
    assert jax.eval_shape(layer, X).shape == X.shape
    y, _ = jax.eval_shape(lambda: layer(X, cache=layer.init_cache(2, length=9)))
    assert y.shape == X.shape


@pytest.mark.parametrize("name", [*MIXERS, *OTHERS])
def test_copies(name):
    layer = make(name)
    for other in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)):
        assert type(other) is type(layer)
        assert nnx.graphdef(other) == nnx.graphdef(layer)
        jax.tree.map(np.testing.assert_array_equal, nnx.state(other), nnx.state(layer))
    assert jax.eval_shape(pickle.loads(pickle.dumps(layer)), X) == jax.eval_shape(layer, X)


@members
def test_axes_that_are_symbolic(name):
    layer, axes = make(name), jax.export.symbolic_shape("b, t")
    x, ids = jax.ShapeDtypeStruct((*axes, HIDDEN), jnp.float32), jax.ShapeDtypeStruct(axes, jnp.int32)
    exported = jax.export.export(jax.jit(lambda x, ids: layer(x, segment_ids=ids)))(x, ids)
    assert exported.out_avals[0].shape == x.shape
