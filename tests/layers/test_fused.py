"""The kernels around the op, interpreted: against float64, and in layers against the plain form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from delta_jax.layers import GatedDeltaNet, KimiDeltaAttention, RMSNorm
from delta_jax.layers.fused import gated_norm
from delta_jax.layers.options import GATE_ACTIVATIONS
from delta_jax.parallel import MeshConfig, make_mesh
from delta_jax.testing import relative_error
from delta_jax.testing.trials import interpreted_tpu
from pallas_kernels.tpu import gated_norm as kernel

NAMES = "y", "o", "scale", "gate"


def problem(heads, size, dtype=jnp.float32, magnitude=1.0):
    """An output, a scale, a gate and the cotangent of the result; tokens differ in size by orders of magnitude."""
    random = np.random.default_rng(0)
    o = magnitude * random.standard_normal((2, 21, heads, size)) * np.exp(3 * random.standard_normal((2, 21, heads, 1)))
    gate, d_y = random.standard_normal((2, 2, 21, heads * size))
    return [jnp.asarray(x, dtype) for x in (o, 1 + 0.3 * random.standard_normal(size), gate, d_y)]


def evaluate(norm, activation, o, scale, gate, d_y):
    """The result and its cotangents by name; those of a gate that is None are left out."""
    y, pull = jax.vjp(lambda o, scale, gate: norm(o, scale, gate, activation), o, scale, gate)
    return {name: x for name, x in zip(NAMES, (y, *pull(d_y)), strict=True) if x is not None}


def by_definition(o, scale, gate, activation):
    y = o / jnp.sqrt(jnp.mean(o**2, -1, keepdims=True) + 1e-5) * scale[None, None, None]
    y = y.reshape(*y.shape[:2], -1)
    return y if gate is None else y * GATE_ACTIVATIONS[activation](gate)


def by_layer(o, scale, gate, activation):
    norm = RMSNorm(scale.shape[0], eps=1e-5)
    norm.scale[...] = scale
    return gated_norm(norm, o, gate, activation, None)


def wanted(activation, *arrays):
    with jax.enable_x64(True):
        return evaluate(by_definition, activation, *jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), arrays))


def assert_right(got, want, limit):
    assert got.keys() == want.keys()
    for name, x in want.items():
        assert relative_error(got[name], x) < limit, name


@pytest.mark.parametrize(
    ("heads", "size", "activation"), [(4, 64, "silu"), (2, 192, "sigmoid"), (3, 512, "silu"), (9, 128, "silu")]
)
def test_the_norm_of_an_output(heads, size, activation):
    given = problem(heads, size)
    with interpreted_tpu():
        assert "gated_norm_forward" in str(jax.make_jaxpr(lambda *x: by_layer(*x, activation))(*given[:3]))
        got = evaluate(by_layer, activation, *given)
    assert_right(got, wanted(activation, *given), 3e-7)


def test_without_a_gate():
    o, scale, _, d_y = problem(2, 64)
    with interpreted_tpu():
        got = evaluate(by_layer, "silu", o, scale, None, d_y)
    assert_right(got, wanted("silu", o, scale, None, d_y), 3e-7)


@pytest.mark.parametrize("magnitude", [1e-30, 1e30])
def test_entries_of_any_size(magnitude):
    given = problem(1, 128, magnitude=magnitude)
    with interpreted_tpu():
        got = evaluate(by_layer, "sigmoid", *given)
    assert_right(got, wanted("sigmoid", *given), 1e-6)


def test_a_token_that_is_not_finite_reaches_nothing_that_is_shared():
    o, scale, gate, d_y = problem(2, 64)
    ill, d_y = o.at[1, 3, 0, 5].set(jnp.nan).at[0, 7, 1].set(jnp.inf), d_y.at[1, 3].set(0.0).at[0, 7].set(0.0)
    with interpreted_tpu():
        got = evaluate(by_layer, "silu", ill, scale, gate, d_y)
    want = wanted("silu", o, scale, gate, d_y)
    for y in (got, want):
        y["y"] = np.array(y["y"])
        y["y"][1, 3] = y["y"][0, 7] = 0.0
    assert_right(got, want, 3e-7)


def test_bfloat16():
    o, scale, gate, d_y = problem(2, 64, jnp.bfloat16)
    given = o, scale.astype(jnp.float32), gate, d_y
    with interpreted_tpu():
        got = evaluate(by_layer, "silu", *given)
    assert {x.dtype for name, x in got.items() if name != "scale"} == {jnp.dtype("bfloat16")}
    assert_right(got, wanted("silu", *given), 3e-3)


def test_a_map_of_layers():
    """Sweeps map parameters and tokens alike."""
    o, scale, gate, d_y = problem(2, 64)
    many = [jnp.stack([x, 2 * x]) for x in (o, scale, gate, d_y)]
    with interpreted_tpu():
        got = jax.vmap(lambda *x: evaluate(by_layer, "silu", *x))(*many)
    for n in range(2):
        want = wanted("silu", *(x[n] for x in many))
        assert_right(jax.tree.map(lambda x, n=n: x[n], got), want, 3e-7)


def test_over_a_mesh():
    """Sequences over data, heads over tensor; the scale's cotangent is summed over both."""
    given = problem(2, 128)
    with interpreted_tpu(), jax.set_mesh(make_mesh(MeshConfig(data=2, tensor=2), jax.devices()[:4])):
        got = jax.jit(lambda *x: evaluate(by_layer, "silu", *x))(*given)
    assert_right(got, wanted("silu", *given), 3e-7)


def test_what_it_does_not_take():
    assert "whole registers" in kernel.unsupported(3 * 64, 64, "float32")
    assert "float16" in kernel.unsupported(128, 128, "float16")
    given = problem(3, 64)
    with interpreted_tpu():
        assert_right(evaluate(by_layer, "silu", *given), wanted("silu", *given), 1e-6)


LAYERS = {
    "gated delta net": lambda: GatedDeltaNet(
        32, num_heads=1, num_v_heads=2, head_dim=64, expand_v=1.0, norm_eps=1e-4, rngs=nnx.Rngs(0)
    ),
    "kimi delta attention": lambda: KimiDeltaAttention(32, num_heads=2, head_dim=64, rngs=nnx.Rngs(0)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer(name):
    """Packed sequences, a mask and a token that is not finite: outputs and gradients are those of the plain form."""
    layer = LAYERS[name]()
    x = jax.random.normal(jax.random.key(1), (2, 20, 32)).at[0, 5].set(jnp.nan)
    ids = (jnp.arange(20) >= 9).astype(jnp.int32)[None].repeat(2, 0)
    mask = jnp.arange(20)[None] < jnp.array([[20], [13]])

    def loss(layer, x):
        y = layer(x, segment_ids=ids, mask=mask)
        return jnp.sum(jnp.where(jnp.isfinite(y), jnp.sin(y), 0.0)), y

    def run():
        (_, y), gradients = nnx.value_and_grad(loss, argnums=(0, 1), has_aux=True)(layer, x)
        return y, gradients

    want_y, want = run()
    with interpreted_tpu():
        got_y, got = run()
    np.testing.assert_array_equal(jnp.isfinite(got_y), jnp.isfinite(want_y))
    assert relative_error(jnp.nan_to_num(got_y), jnp.nan_to_num(want_y)) < 1e-5
    for path, wanted_leaf in jax.tree_util.tree_leaves_with_path(want):
        found = dict(jax.tree_util.tree_leaves_with_path(got))[path]
        assert jnp.isfinite(found).all(), path
        assert relative_error(found, wanted_leaf) < 1e-4, path
