"""The contract of every layer on the shared mixer, whatever its inputs of the op are."""

import functools
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from delta_jax.layers import MIXERS, Mixer
from delta_jax.parallel import MeshConfig, make_mesh, parameter_shardings
from delta_jax.testing import relative_error
from delta_jax.training.optimizer import weight_decay_mask

HIDDEN, TIME, PREFILL = 16, 19, 7
SMALL = {"num_heads": 2, "head_dim": 8, "expand_v": 1.0, "chunk_size": 16, "initializer_std": 0.3}
GROUPED = {"num_v_heads": 4, "expand_v": 1.5}
NEGATIVE = {"allow_negative_eigenvalues": True}

# Two sets of options of every member, far apart from one another; a new member is one line here.
MEMBERS = {
    "delta_net": (
        {},
        GROUPED
        | NEGATIVE
        | {"use_output_gate": True, "use_beta": False, "use_output_norm": False, "conv_bias": True}
        | {"qk_activation": "elu", "qk_norm": "sum"},
    ),
    "delta_product": ({"num_householder": 3}, GROUPED | {"num_householder": 2, "use_short_conv": False}),
    "gated_delta_net": ({}, GROUPED | NEGATIVE | {"use_short_conv": False, "use_output_gate": False}),
    "gated_delta_net_2": ({}, GROUPED | NEGATIVE | {"output_gate_activation": "sigmoid", "output_norm_eps": 1e-2}),
    "gated_delta_product": ({"num_householder": 3}, GROUPED | {"num_householder": 1, "use_output_gate": False}),
    "gated_linear_attention": ({}, GROUPED | {"use_short_conv": True, "gate_rank": 3}),
    "kaczmarz_linear_attention": ({}, GROUPED | NEGATIVE | {"conv_bias": True}),
    "kimi_delta_attention": (
        {"use_output_gate_bias": False},
        GROUPED
        | NEGATIVE
        | {"gate_lower_bound": -5.0, "output_gate_activation": "silu", "use_low_rank_gates": False, "conv_bias": True},
    ),
    "linear_attention": ({}, GROUPED | {"use_output_gate": True, "conv_size": 2, "use_short_conv": True}),
    "mamba2": ({}, {"num_heads": 1, "num_v_heads": 3, "use_output_gate": False}),
    "retnet": ({}, GROUPED | {"use_output_gate": False}),
}
SEGMENTS = np.array([[3] * 6 + [1] + [3] * 12, [0] * 12 + [7] * 6 + [8]], np.int32)


@functools.cache
def make(name, variant=0, seed=0, **options):
    return MIXERS[name](HIDDEN, **(SMALL | MEMBERS[name][variant] | options), rngs=nnx.Rngs(seed))


def inputs(seed=1, time=TIME):
    return jax.random.normal(jax.random.key(seed), (2, time, HIDDEN))


@jax.jit
def call(layer, x, segment_ids, cache):
    return layer(x, segment_ids=segment_ids, cache=cache)


def run(layer, x, segment_ids=None):
    """From the beginning; one compiled function for all that is asked of a layer and a length."""
    ids = np.zeros(x.shape[:2], np.int32) if segment_ids is None else segment_ids
    return call(layer, x, jnp.asarray(ids), layer.init_cache(len(x)))


members = pytest.mark.parametrize("name", MEMBERS)
variants = pytest.mark.parametrize(("name", "variant"), [(name, n) for name in MEMBERS for n in range(2)])


def test_no_member_is_left_out():
    assert set(MEMBERS) == {name for name, layer in MIXERS.items() if issubclass(layer, Mixer)}


@variants
def test_prefill_and_steps_equal_the_whole(name, variant):
    """With segments that end inside the prefill, at a step and between calls; ids may be left out where none changes.

    The second variant begins with single tokens, which saves the time to compile two functions.
    """
    layer, x = make(name, variant), inputs()
    whole, last = run(layer, x, SEGMENTS)
    prefill = (PREFILL, 1)[variant]
    y, cache = run(layer, x[:, :prefill], SEGMENTS[:, :prefill])
    outputs = [y]
    for t in range(prefill, TIME):
        ids = SEGMENTS[:, t : t + 1]
        needless = variant == 0 and (ids[:, 0] == cache.segment_id).all()
        y, cache = call(layer, x[:, t : t + 1], None if needless else ids, cache)
        outputs.append(y)
    assert relative_error(jnp.concatenate(outputs, axis=1), whole) < 3e-6
    for one, other in zip(jax.tree.leaves(cache), jax.tree.leaves(last), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(one, other, atol=2e-5)
    np.testing.assert_array_equal(cache.segment_id, SEGMENTS[:, -1])
    np.testing.assert_array_equal(cache.position, [12, 1])


@variants
def test_packed_equals_separate(name, variant):
    layer, x = make(name, variant), inputs()
    packed, _ = run(layer, x, SEGMENTS)
    assert relative_error(packed, run(layer, x)[0]) > 0.05
    pieces = [
        (row, start, stop)
        for row in range(2)
        for start, stop in pairwise([0, *(np.flatnonzero(np.diff(SEGMENTS[row])) + 1).tolist(), TIME])
    ]
    for row, start, stop in pieces:
        alone, _ = run(
            layer, jnp.roll(x[np.array([row, row])], -start, axis=1)
        )  # what follows the piece changes nothing in it
        assert relative_error(packed[row, start:stop], alone[0, : stop - start]) < 3e-6


@variants
def test_outputs_never_depend_on_later_inputs(name, variant):
    layer, x = make(name, variant), inputs()
    y, _ = run(layer, x)
    for cut in (1, 5, 16):
        changed, _ = run(layer, x.at[:, cut:].set(inputs(2)[:, cut:]))
        np.testing.assert_array_equal(y[:, :cut], changed[:, :cut])
        assert relative_error(y[:, cut:], changed[:, cut:]) > 0.1


@variants
def test_gradients_reach_every_parameter(name, variant):
    layer, x, weights = make(name, variant), inputs(), inputs(3)

    def loss(layer):
        y = layer(x)
        return jnp.sum(weights * y), y

    gradients, y = jax.jit(jax.grad(loss, has_aux=True))(layer)
    assert relative_error(y, run(layer, x)[0]) < 1e-6
    for path, gradient in nnx.to_flat_state(nnx.state(gradients)):
        size = np.sqrt(np.mean(np.square(gradient[...])))
        assert np.isfinite(size), path
        assert size > 1e-6, path


@variants
def test_every_parameter_has_a_place_on_the_mesh_and_a_word_on_weight_decay(name, variant):
    parameters = {"mixer": nnx.to_pure_dict(nnx.state(make(name, variant)))}
    parameter_shardings(parameters, make_mesh(MeshConfig(), devices=jax.devices()[:1]))
    assert any(jax.tree.leaves(weight_decay_mask(parameters)))


@members
def test_the_seed_decides_every_number(name):
    x = inputs()
    y, _ = run(make(name, seed=5), x)
    again, _ = run(MIXERS[name](HIDDEN, **(SMALL | MEMBERS[name][0]), rngs=nnx.Rngs(5)), x)
    other, _ = run(make(name, seed=6), x)
    np.testing.assert_array_equal(y, again)
    assert relative_error(other, y) > 0.1


@variants
def test_the_cache_does_not_grow(name, variant):
    layer = make(name, variant)
    wanted = jax.tree.map(lambda a: (a.shape, a.dtype), layer.init_cache(2))
    for time in (1, 2, 40):
        cache = jax.eval_shape(lambda layer, x: layer(x, return_cache=True)[1], layer, inputs(time=time))
        assert jax.tree.map(lambda a: (a.shape, a.dtype), cache) == wanted
    assert wanted.state[0] == (2, layer.num_v_heads, layer.key_dim, layer.value_dim)


@members
def test_bfloat16_computes_near_float32(name):
    x = inputs()
    wide, _ = run(make(name), x)
    layer = make(name, dtype=jnp.bfloat16)
    narrow, cache = run(layer, x)
    assert narrow.dtype == jnp.bfloat16
    assert cache.state.dtype == jnp.float32
    assert 1e-4 < relative_error(narrow, wide) < 0.05
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(nnx.state(layer)))


@members
def test_the_cache_is_returned_only_when_asked_for(name):
    layer, x = make(name), inputs()
    assert len(jax.eval_shape(lambda: layer(x, return_cache=True))) == 2
    assert jax.eval_shape(lambda: layer(x)).shape == x.shape


@members
@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"num_heads": 0}, "num_heads"),
        ({"num_heads": 3, "head_dim": None}, "num_heads"),
        ({"head_dim": 2.5}, "head_dim"),
        ({"num_v_heads": 3}, "num_v_heads"),
        ({"expand_v": 1.3}, "expand_v"),
        ({"expand_v": "wide"}, "expand_v"),
        ({"conv_size": 0}, "conv_size"),
        ({"use_short_conv": 1}, "use_short_conv"),
        ({"use_output_gate": "yes"}, "use_output_gate"),
        ({"norm_eps": 0.0}, "norm_eps"),
        ({"output_norm_eps": 0.0}, "output_norm_eps must be a positive number, got 0.0"),
        ({"output_gate_activation": "tanh"}, "output_gate_activation must be one of silu, sigmoid, got 'tanh'"),
        ({"conv_bias": True, "use_short_conv": False}, "conv_bias must be false without use_short_conv"),
        ({"initializer_std": -1.0}, "initializer_std"),
        ({"chunk_size": -16}, "chunk_size"),
    ],
)
def test_impossible_options_are_named(name, options, word):
    with pytest.raises(ValueError, match=word):
        make(name, **options)


@members
def test_an_implementation_that_does_not_exist_is_named(name):
    with pytest.raises(ValueError, match="implementation"):
        make(name, implementation="abacus")(inputs())


@pytest.mark.parametrize(
    ("name", "options", "word"),
    [
        ("delta_product", {"num_householder": 0}, "num_householder must be a positive integer, got 0"),
        ("gated_delta_product", {"num_householder": None}, "num_householder"),
        ("kimi_delta_attention", {"gate_lower_bound": 5.0}, "gate_lower_bound must be a negative number"),
        ("kimi_delta_attention", {"use_low_rank_gates": 1}, "use_low_rank_gates must be true or false, got 1"),
        ("kimi_delta_attention", {"use_output_gate_bias": None}, "use_output_gate_bias must be true or false"),
        ("delta_net", {"use_beta": 0}, "use_beta must be true or false, got 0"),
        ("delta_net", {"qk_norm": "max"}, "qk_norm must be one of l2, sum, got 'max'"),
        ("delta_net", {"qk_activation": "tanh"}, "qk_activation must be one of silu, relu, elu, identity, got 'tanh'"),
        ("delta_net", {"use_output_norm": False, "output_norm_eps": 1e-5}, "output_norm_eps must be None without"),
        ("gated_linear_attention", {"gate_rank": 0}, "gate_rank"),
        ("linear_attention", {"feature_map": "relu"}, "feature_map must be one of elu, l2, got 'relu'"),
        ("gated_linear_attention", {"gate_normalizer": 0.0}, "gate_normalizer"),
        ("retnet", {"head_dim": 7}, "head_dim must be even"),
        ("mamba2", {"norm_groups": 0}, "norm_groups must be a positive integer, got 0"),
        ("mamba2", {"norm_groups": 5}, "norm_groups must divide the 32 channels of x, got 5"),
        ("mamba2", {"expand_v": 1.375, "num_v_heads": None}, "expand_v must make heads of x that fill 32, got 11"),
    ],
)
def test_impossible_options_of_a_member_are_named(name, options, word):
    with pytest.raises(ValueError, match=word):
        make(name, **options)
