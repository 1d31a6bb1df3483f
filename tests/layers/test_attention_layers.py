"""Softmax attention: its equations in float64, and what every mixer promises about caches and packed sequences."""

import functools
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from delta_jax.layers import Attention, LatentAttention, RopeScaling
from delta_jax.parallel import MeshConfig, make_mesh, parameter_shardings
from delta_jax.testing import relative_error
from delta_jax.training.optimizer import weight_decay_mask

HIDDEN, TIME = 12, 17
YARN = RopeScaling(kind="yarn", factor=4.0, original_max_position_embeddings=40, beta_fast=4.0)
LATENT = {"num_heads": 3, "kv_lora_rank": 7, "qk_nope_head_dim": 4, "v_head_dim": 5, "norm_eps": 1e-3}
LAYERS = {
    "plain": (Attention, {"num_heads": 2}),
    "grouped": (Attention, {"num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "rope_theta": 100.0}),
    "no_positions": (Attention, {"num_heads": 3, "num_kv_heads": 1, "rope_fraction": 0.0}),
    "window": (Attention, {"num_heads": 2, "window": 5}),
    "wide_window": (Attention, {"num_heads": 2, "window": 40}),
    "token": (Attention, {"num_heads": 2, "window": 1, "use_output_gate": True}),
    "gated": (
        Attention,
        {
            "num_heads": 4,
            "num_kv_heads": 2,
            "head_dim": 8,
            "rope_fraction": 0.25,
            "use_qk_norm": True,
            "zero_centered_norms": True,
            "use_output_gate": True,
        },
    ),
    "normed_window": (Attention, {"num_heads": 2, "window": 4, "use_qk_norm": True, "norm_eps": 1e-2}),
    "biased": (
        Attention,
        {
            "num_heads": 4,
            "num_kv_heads": 2,
            "head_dim": 6,
            "use_qk_norm": True,
            "qk_norm_width": "all",
            "use_qkv_bias": True,
            "use_output_bias": True,
            "rope_scaling": YARN,
        },
    ),
    "latent": (LatentAttention, LATENT | {"qk_rope_head_dim": 2}),
    "turned_latent": (LatentAttention, LATENT | {"qk_rope_head_dim": 4, "rope_theta": 20.0, "kv_norm_eps": 0.3}),
    "ling": (
        LatentAttention,
        LATENT
        | {"qk_rope_head_dim": 6, "rope_theta": 20.0, "rope_interleaved": True, "use_head_gate": True, "q_lora_rank": 5}
        | {"kv_norm_eps": 0.3},
    ),
}
SEGMENTS = np.array([[3] * 6 + [1] + [3] * 10, [0] * 10 + [7] + [8] * 6], np.int32)


@functools.cache
def make(name, seed=0, **options):
    layer, own = LAYERS[name]
    made = layer(HIDDEN, **({"initializer_std": 0.4} | own | options), rngs=nnx.Rngs(seed))
    for path, value in nnx.to_flat_state(nnx.state(made)):
        if path[-1] in ("scale", "offset", "bias"):
            value[...] = value[...] + jnp.linspace(-0.5, 0.5, value.shape[0], dtype=value.dtype)
    return made


def inputs(seed=1):
    return jax.random.normal(jax.random.key(seed), (2, TIME, HIDDEN))


@jax.jit
def run(layer, x, segment_ids=None, cache=None):
    return layer(x, segment_ids=segment_ids, cache=cache, return_cache=True)


def close(one, other, atol=2e-6):
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert (left.shape, left.dtype) == (right.shape, right.dtype)
        np.testing.assert_allclose(left, right, atol=atol)


layers = pytest.mark.parametrize("name", LAYERS)
some_layers = pytest.mark.parametrize("name", ["gated", "window", "latent", "ling"])


def parameters(layer):
    flat = nnx.to_flat_state(nnx.state(layer))
    return {"/".join(map(str, path)): np.asarray(value[...], np.float64) for path, value in flat}


def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))


def unit(x, scale, eps):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * scale


def softmax_average(scores, values):
    weights = np.exp(scores - scores.max())
    return weights @ values / weights.sum()


def turn(x, position, theta, channels, factors=1.0):
    """Rotation of complex numbers, one for each pair of channels of x [channels of a head]."""
    pairs = x[: channels // 2] + 1j * x[channels // 2 : channels]
    pairs = pairs * np.exp(1j * position * factors / theta ** (np.arange(0, channels, 2) / max(channels, 1)))
    return np.concatenate([pairs.real, pairs.imag, x[channels:]])


def attention(p, x, o):
    """One sequence x [T, d], token by token and head by head, with the layer's parameters p and options o."""
    heads, kv_heads = o["num_heads"], o.get("num_kv_heads") or o["num_heads"]
    size, window = o.get("head_dim") or HIDDEN // heads, o.get("window") or len(x)
    channels, theta = round(size * o.get("rope_fraction", 1.0)), o.get("rope_theta", 1e4)
    q, k, v = (x @ p[f"{name}_proj/kernel"] + p.get(f"{name}_proj/bias", 0.0) for name in "qkv")
    every = o.get("qk_norm_width") == "all"
    if every:
        q, k = unit(q, p["q_norm/scale"], o["norm_eps"]), unit(k, p["k_norm/scale"], o["norm_eps"])
    q, k, v = q.reshape(-1, heads, size), k.reshape(-1, kv_heads, size), v.reshape(-1, kv_heads, size)
    stretch = {"theta": theta, "channels": channels}
    factors = o["rope_scaling"].factors(**stretch) if "rope_scaling" in o else 1.0
    amplitude = o["rope_scaling"].amplitude if "rope_scaling" in o else 1.0
    if o.get("use_qk_norm") and not every:
        q, k = (
            unit(y, 1 + p[f"{n}_norm/offset"] if o.get("zero_centered_norms") else p[f"{n}_norm/scale"], o["norm_eps"])
            for y, n in ((q, "q"), (k, "k"))
        )
    out = np.zeros((len(x), heads, size))
    for t in range(len(x)):
        for h in range(heads):
            seen = range(max(0, t - window + 1), t + 1)
            kept = h // (heads // kv_heads)
            query = amplitude**2 * turn(
                q[t, h], t, theta, channels, factors
            )  # all channels are turned where it is not 1
            scores = np.array([query @ turn(k[s, kept], s, theta, channels, factors) for s in seen]) / np.sqrt(size)
            out[t, h] = softmax_average(scores, np.stack([v[s, kept] for s in seen]))
    out = out.reshape(len(x), -1)
    if o.get("use_output_gate"):
        out = out * sigmoid(x @ p["g_proj/kernel"])
    return out @ p["o_proj/kernel"] + p.get("o_proj/bias", 0.0)


def latent_attention(p, x, o):
    own, turned = o["qk_nope_head_dim"], o["qk_rope_head_dim"]
    heads, size, eps = o["num_heads"], own + turned, o.get("kv_norm_eps", o["norm_eps"])
    low = x @ p["kv_a_proj/kernel"]
    both = unit(low[:, : o["kv_lora_rank"]], p["kv_norm/scale"], eps) @ p["kv_b_proj/kernel"]
    if "q_lora_rank" in o:
        q = unit(x @ p["q_a_proj/kernel"], p["q_norm/scale"], eps) @ p["q_b_proj/kernel"]
    else:
        q = x @ p["q_proj/kernel"]
    both, q = both.reshape(len(x), heads, -1), q.reshape(len(x), heads, size)
    if "rope_theta" in o:  # interleaved pairs, with the even channels first, are pairs of halves
        order = np.r_[0:turned:2, 1:turned:2] if o.get("rope_interleaved") else np.arange(turned)
        for t in range(len(x)):
            low[t, -turned:] = turn(low[t, -turned:][order], t, o["rope_theta"], turned)
            for h in range(heads):
                q[t, h, own:] = turn(q[t, h, own:][order], t, o["rope_theta"], turned)
    out = np.zeros((len(x), heads, o["v_head_dim"]))
    for h in range(heads):
        k = np.concatenate([both[:, h, : o["qk_nope_head_dim"]], low[:, o["kv_lora_rank"] :]], axis=1)
        for t in range(len(x)):
            out[t, h] = softmax_average(k[: t + 1] @ q[t, h] / np.sqrt(size), both[: t + 1, h, o["qk_nope_head_dim"] :])
    if o.get("use_head_gate"):
        out = out * sigmoid(x @ p["g_proj/kernel"])[:, :, None]
    return out.reshape(len(x), -1) @ p["o_proj/kernel"]


@layers
def test_layer_computes_its_equations(name):
    layer, x = make(name), inputs()
    y, _ = run(layer, x)
    reference = attention if LAYERS[name][0] is Attention else latent_attention
    options = {"norm_eps": 1e-5} | LAYERS[name][1]
    wanted = np.stack([reference(parameters(layer), np.asarray(row, np.float64), options) for row in x])
    assert relative_error(y, wanted) < 1e-6


@layers
def test_step_by_step_equals_the_whole(name):
    layer, x = make(name), inputs()
    whole, last = run(layer, x)
    cache, outputs = layer.init_cache(2, length=TIME), []
    for t in range(TIME):
        y, cache = run(layer, x[:, t : t + 1], None, cache)
        outputs.append(y)
    assert relative_error(jnp.concatenate(outputs, axis=1), whole) < 1e-6
    close(cache, last)


@some_layers
def test_packed_equals_separate(name):
    """What follows a piece changes nothing in it, so that one compiled function does for pieces of all lengths."""
    layer, x = make(name), inputs()
    packed, cache = run(layer, x, jnp.asarray(SEGMENTS))
    for row in range(2):
        edges = [0, *(np.flatnonzero(np.diff(SEGMENTS[row])) + 1).tolist(), TIME]
        for start, stop in pairwise(edges):
            alone, _ = run(layer, jnp.roll(x, -start, axis=1))
            assert relative_error(packed[row, start:stop], alone[row, : stop - start]) < 1e-6
        assert cache.position[row] == edges[-1] - edges[-2]
    np.testing.assert_array_equal(cache.segment_id, SEGMENTS[:, -1])


@some_layers
@pytest.mark.parametrize("cut", [6, 16])
def test_a_call_continues_the_segment_of_the_cache_or_begins_anew(name, cut):
    layer, x, ids = make(name), inputs(), jnp.asarray(SEGMENTS)
    whole, _ = run(layer, x, ids)
    first, cache = run(layer, x[:, :cut], ids[:, :cut], layer.init_cache(2, length=TIME))
    second, cache = run(layer, x[:, cut:], ids[:, cut:], cache)
    assert relative_error(jnp.concatenate([first, second], axis=1), whole) < 1e-6
    close(cache, run(layer, x, ids, layer.init_cache(2, length=TIME))[1])


@some_layers
def test_a_call_without_ids_continues_the_last_segment(name):
    layer, x = make(name), inputs()
    ids = jnp.asarray(SEGMENTS).at[:, 12:].set(SEGMENTS[:, 11:12])
    whole, _ = run(layer, x, ids)
    _, cache = run(layer, x[:, :12], ids[:, :12], layer.init_cache(2, length=TIME))
    rest, cache = run(layer, x[:, 12:], None, cache)
    assert relative_error(rest, whole[:, 12:]) < 1e-6
    np.testing.assert_array_equal(cache.segment_id, ids[:, -1])


@some_layers
def test_outputs_never_depend_on_later_inputs(name):
    layer, x = make(name), inputs()
    y, _ = run(layer, x)
    for cut in (1, 5, 16):
        changed, _ = run(layer, x.at[:, cut:].set(inputs(2)[:, cut:]))
        np.testing.assert_array_equal(y[:, :cut], changed[:, :cut])
        assert relative_error(y[:, cut:], changed[:, cut:]) > 0.1


def test_a_window_hides_what_lies_before_it():
    layer, x = make("window"), inputs()
    y, _ = run(layer, x)
    changed, _ = run(layer, x.at[:, 3].add(1.0))
    np.testing.assert_array_equal(y[:, 8:], changed[:, 8:])
    assert (jnp.abs(y - changed)[:, 3:8].max(axis=-1) > 1e-3).all()


@layers
def test_gradients_reach_every_parameter(name):
    layer, x, weights = make(name), inputs(), inputs(3)
    gradients = jax.jit(jax.grad(lambda layer: jnp.sum(weights * layer(x, segment_ids=jnp.asarray(SEGMENTS)))))(layer)
    for path, gradient in nnx.to_flat_state(nnx.state(gradients)):
        size = np.sqrt(np.mean(np.square(gradient[...])))
        if name == "token" and path[0] in ("q_proj", "k_proj"):  # a softmax over one number
            assert size < 1e-6
        else:
            assert size > 1e-4, path


@layers
def test_a_cache_keeps_the_window_or_the_length_asked_for(name):
    layer = make(name)
    for time in (1, 2, 9):
        cache = layer.init_cache(2, length=9)
        new = jax.eval_shape(run, layer, inputs()[:, :time], None, cache)[1]
        assert jax.tree.map(lambda a: (a.shape, a.dtype), (new, cache))[0] == jax.tree.map(
            lambda a: (a.shape, a.dtype), cache
        )
        assert cache.entries[0].shape[1] == (layer.window or 9)


@layers
def test_every_parameter_has_a_place_on_the_mesh_and_a_word_on_weight_decay(name):
    parameters = {"mixer": nnx.to_pure_dict(nnx.state(make(name)))}
    parameter_shardings(parameters, make_mesh(MeshConfig(), devices=jax.devices()[:1]))
    for path, decays in jax.tree_util.tree_leaves_with_path(weight_decay_mask(parameters)):
        assert decays == (path[-1].key in ("kernel", "offset")), path


def test_the_cache_of_latents_holds_what_is_turned():
    """So that a step turns one token: the shared keys of the cache are those of the sequence, each at its position."""
    layer, x = make("ling"), inputs()
    _, cache = run(layer, x)
    shared = x @ layer.kv_a_proj.kernel[...][:, 7:]
    wide = np.asarray(shared, np.float64)
    pairs = (wide[..., ::2] + 1j * wide[..., 1::2]) * np.exp(1j * np.arange(TIME)[:, None] / 20.0 ** (np.arange(3) / 3))
    wanted = np.stack([pairs.real, pairs.imag], -1).reshape(wide.shape)
    np.testing.assert_allclose(cache.entries[0][..., 7:], wanted, atol=1e-5)
    assert make("ling").init_cache(2, length=9).entries[0].shape == (2, 9, 7 + 6)


def test_the_latent_cache_is_small():
    sizes = [entry.shape for entry in make("latent").init_cache(2, length=9).entries]
    assert sizes == [(2, 9, 7 + 2)]


@pytest.mark.parametrize(
    ("name", "dtype"), [("gated", jnp.bfloat16), ("latent", jnp.bfloat16), ("window", jnp.float16)]
)
def test_narrow_types_compute_near_float32(name, dtype):
    x = inputs()
    wide, _ = run(make(name), x)
    narrow, cache = run(make(name, dtype=dtype), x)
    assert narrow.dtype == dtype
    assert all(entry.dtype == dtype for entry in cache.entries)
    assert 1e-5 < relative_error(narrow, wide) < 0.02


@pytest.mark.parametrize("name", ["gated", "latent"])
def test_a_full_cache_is_refused_or_poisons_what_lies_beyond(name):
    layer, x = make(name), inputs()
    whole, cache = run(layer, x[:, :9], None, layer.init_cache(2, length=9))
    with pytest.raises(ValueError, match=r"room for 9 tokens of a segment and holds 9, but 1 more .*length=10\)"):
        layer(x[:, 9:10], cache=cache)
    with pytest.raises(ValueError, match="room for 9 tokens of a segment and holds 0, but 17 more"):
        run(layer, x, None, layer.init_cache(2, length=9))
    beyond, cache = run(layer, x[:, 9:10], None, cache)
    assert np.isnan(beyond).all()
    assert np.isnan(run(layer, x[:, 10:12], None, cache)[0]).all()
    ids = jnp.full((2, 1), 5)
    fresh, cache = run(layer, x[:, :1], ids, cache)  # a new segment begins with an empty cache
    np.testing.assert_allclose(fresh, whole[:, :1], atol=1e-6)


def test_the_implementation_asked_for_runs_with_segments_and_caches(monkeypatch):
    """cuDNN needs a GPU; that it is called does not."""
    called, library = [], jax.nn.dot_product_attention

    def recorded(*arrays, implementation, **options):
        called.append(implementation)
        return library(*arrays, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", recorded)
    monkeypatch.setattr("delta_jax.ops.device.platform", lambda: "gpu")
    layer, x = make("plain", implementation="cudnn", dtype=jnp.bfloat16), inputs().astype(jnp.bfloat16)
    run(layer, x, jnp.zeros(x.shape[:2], jnp.int32))
    cache = layer.init_cache(2, length=x.shape[1])
    _, cache = layer(x[:, :-1], cache=cache, return_cache=True)
    layer(x[:, -1:], cache=cache)
    assert called == ["cudnn"] * 3


def test_attention_without_a_window_wants_a_length():
    for length in (None, 0, 2.5):
        with pytest.raises(ValueError, match="length must be a positive integer"):
            make("plain").init_cache(2, length=length)
    assert make("window").init_cache(2).entries[0].shape == (2, 5, 2, 6)


@pytest.mark.parametrize(
    ("name", "options", "word"),
    [
        ("plain", {"num_heads": 0}, "num_heads"),
        ("plain", {"num_heads": 5}, "num_heads must divide hidden_size"),
        ("plain", {"num_kv_heads": 3}, "num_kv_heads must divide num_heads, got 3 and 2"),
        ("plain", {"window": 0}, "window must be a positive integer, got 0"),
        ("plain", {"window": 2.5}, "window"),
        ("plain", {"head_dim": -1}, "head_dim"),
        ("plain", {"head_dim": 3}, "rope_fraction must make an even number"),
        ("plain", {"rope_fraction": 0.5, "head_dim": 6}, "rope_fraction"),
        ("plain", {"rope_fraction": 1.5}, r"rope_fraction must lie in \[0, 1\]"),
        ("plain", {"rope_theta": 0.0}, "rope_theta"),
        ("plain", {"use_qk_norm": 1}, "use_qk_norm must be true or false"),
        ("plain", {"use_output_gate": None}, "use_output_gate"),
        ("plain", {"use_qkv_bias": 1}, "use_qkv_bias must be true or false, got 1"),
        ("plain", {"use_output_bias": "no"}, "use_output_bias must be true or false, got 'no'"),
        ("plain", {"qk_norm_width": "heads"}, "qk_norm_width must be one of head, all, got 'heads'"),
        ("plain", {"qk_norm_width": "all"}, "qk_norm_width 'all' needs use_qk_norm"),
        ("plain", {"rope_scaling": "yarn"}, "rope_scaling must be a RopeScaling or None, got 'yarn'"),
        ("plain", {"rope_scaling": YARN, "rope_theta": 1.0}, "theta must be above 1 where wave lengths are stretched"),
        ("plain", {"norm_eps": 0.0}, "norm_eps"),
        ("plain", {"implementation": "abacus"}, "implementation"),
        ("latent", {"kv_lora_rank": 0}, "kv_lora_rank"),
        ("latent", {"v_head_dim": 9}, "v_head_dim must be at most"),
        ("latent", {"initializer_std": -1.0}, "initializer_std"),
        ("latent", {"kv_norm_eps": 0.0}, "kv_norm_eps must be a positive number, got 0.0"),
        ("latent", {"q_lora_rank": 0}, "q_lora_rank must be a positive integer, got 0"),
        ("latent", {"use_head_gate": 1}, "use_head_gate must be true or false, got 1"),
        ("latent", {"rope_interleaved": None}, "rope_interleaved must be true or false"),
        ("latent", {"rope_theta": -1.0}, "rope_theta must be a positive number"),
        ("latent", {"rope_theta": 1e4, "qk_rope_head_dim": 3}, "qk_rope_head_dim must be even, .* got 3"),
    ],
)
def test_impossible_options_are_named(name, options, word):
    with pytest.raises(ValueError, match=word):
        make(name, **options)
