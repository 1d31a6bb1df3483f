"""What every member of MIXERS promises, whatever its inputs of the rule are."""

import functools
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from delta_jax.layers import MIXERS, Mixer

HIDDEN, TIME = 16, 19
SMALL = {"num_heads": 2, "head_dim": 8, "chunk_size": 16, "initializer_std": 0.3}
VARIANTS = {
    "default": {},
    "grouped": {"num_v_heads": 4, "expand_v": 1.5},
    "no_convolution": {"use_short_conv": False},
    "gate_and_negative": {"use_output_gate": True, "allow_negative_eigenvalues": True},
}
SEGMENTS = np.array([[3] * 6 + [1] + [3] * 12, [0] * 12 + [7] * 6 + [8]], np.int32)


@functools.cache
def make(name, variant="default", seed=0, **options):
    return MIXERS[name](HIDDEN, **(SMALL | VARIANTS[variant] | options), rngs=nnx.Rngs(seed))


def inputs(seed=1, time=TIME):
    return jax.random.normal(jax.random.key(seed), (2, time, HIDDEN))


@jax.jit
def run(layer, x, segment_ids=None, cache=None):
    return layer(x, segment_ids=segment_ids, cache=cache, return_cache=True)


def relative(actual, wanted):
    actual, wanted = np.asarray(actual, np.float64), np.asarray(wanted, np.float64)
    return np.sqrt(np.mean((actual - wanted) ** 2) / np.mean(wanted**2))


members = pytest.mark.parametrize("name", sorted(name for name, layer in MIXERS.items() if issubclass(layer, Mixer)))
variants = pytest.mark.parametrize("variant", sorted(VARIANTS))


@members
@variants
def test_step_by_step_equals_the_whole(name, variant):
    layer, x = make(name, variant), inputs()
    whole, last = run(layer, x)
    cache, outputs = layer.init_cache(2), []
    for t in range(TIME):
        y, cache = run(layer, x[:, t : t + 1], None, cache)
        outputs.append(y)
    assert relative(jnp.concatenate(outputs, axis=1), whole) < 3e-6
    for one, other in zip(jax.tree.leaves(cache), jax.tree.leaves(last), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(one, other, atol=1e-5)


@members
@variants
def test_packed_equals_separate(name, variant):
    layer, x = make(name, variant), inputs()
    packed, cache = run(layer, x, jnp.asarray(SEGMENTS))
    unpacked, _ = run(layer, x)
    assert relative(packed, unpacked) > 0.05
    for row in range(2):
        edges = [0, *(np.flatnonzero(np.diff(SEGMENTS[row])) + 1).tolist(), TIME]
        for start, stop in pairwise(edges):
            alone, tail = run(layer, x[row : row + 1, start:stop])
            assert relative(packed[row : row + 1, start:stop], alone) < 3e-6
        np.testing.assert_allclose(cache.state[row], tail.state[0], atol=1e-5)
        for one, other in zip(cache.convolution, tail.convolution, strict=True):
            np.testing.assert_allclose(one[row], other[0], atol=1e-6)
    np.testing.assert_array_equal(cache.segment_id, SEGMENTS[:, -1])


@members
@pytest.mark.parametrize("cut", [1, 6, 7, 18])
def test_a_call_continues_the_segment_of_the_cache_or_begins_anew(name, cut):
    layer, x, ids = make(name), inputs(), jnp.asarray(SEGMENTS)
    whole, last = run(layer, x, ids)
    first, cache = run(layer, x[:, :cut], ids[:, :cut])
    second, cache = run(layer, x[:, cut:], ids[:, cut:], cache)
    assert relative(jnp.concatenate([first, second], axis=1), whole) < 3e-6
    for one, other in zip(jax.tree.leaves(cache), jax.tree.leaves(last), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@members
def test_a_call_without_ids_continues_the_last_segment(name):
    layer, x, ids = make(name), inputs(), jnp.asarray(SEGMENTS)
    ids = jnp.concatenate([ids[:, :12], jnp.repeat(ids[:, 11:12], TIME - 12, axis=1)], axis=1)
    whole, _ = run(layer, x, ids)
    _, cache = run(layer, x[:, :12], ids[:, :12])
    rest, cache = run(layer, x[:, 12:], None, cache)
    assert relative(rest, whole[:, 12:]) < 3e-6
    np.testing.assert_array_equal(cache.segment_id, ids[:, -1])


@members
@variants
def test_outputs_never_depend_on_later_inputs(name, variant):
    layer, x = make(name, variant), inputs()
    y, _ = run(layer, x)
    for cut in (1, 5, 16):
        changed, _ = run(layer, x.at[:, cut:].set(inputs(2)[:, cut:]))
        np.testing.assert_array_equal(y[:, :cut], changed[:, :cut])
        assert relative(y[:, cut:], changed[:, cut:]) > 0.1


@members
@variants
def test_gradients_reach_every_parameter(name, variant):
    layer, x = make(name, variant), inputs()
    weights = inputs(3)
    gradients = jax.jit(jax.grad(lambda layer: jnp.sum(weights * layer(x))))(layer)
    for path, gradient in nnx.to_flat_state(nnx.state(gradients)):
        size = np.sqrt(np.mean(np.square(gradient[...])))
        assert np.isfinite(size), path
        assert size > 1e-6, path


@members
def test_the_seed_decides_every_number(name):
    x = inputs()
    y, _ = run(make(name, seed=5), x)
    again, _ = run(make(name, seed=5), x)
    other, _ = run(make(name, seed=6), x)
    np.testing.assert_array_equal(y, again)
    assert relative(other, y) > 0.1


@members
def test_the_cache_does_not_grow(name):
    layer = make(name, "grouped")
    shapes = [
        jax.tree.map(lambda a: (a.shape, a.dtype), jax.eval_shape(run, layer, inputs(time=time))[1])
        for time in (1, 2, 40)
    ]
    assert shapes[0] == shapes[1] == shapes[2]
    assert jax.tree.map(lambda a: (a.shape, a.dtype), layer.init_cache(2)) == shapes[0]
    assert layer.init_cache(2).state.shape == (2, 4, 8, 12)


@members
def test_bfloat16_computes_near_float32(name):
    x = inputs()
    wide, _ = run(make(name), x)
    narrow, cache = run(make(name, dtype=jnp.bfloat16), x)
    assert narrow.dtype == jnp.bfloat16
    assert cache.state.dtype == jnp.float32
    assert 1e-4 < relative(narrow, wide) < 0.05
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(nnx.state(make(name, dtype=jnp.bfloat16))))


@members
def test_the_cache_is_returned_only_when_asked_for(name):
    layer, x = make(name), inputs()
    y, cache = layer(x, cache=layer.init_cache(2))
    assert relative(layer(x), y) < 1e-6
    assert cache.state.shape == (2, 2, layer.key_dim, layer.value_dim)


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
