"""Norms of entries of any size, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.test_util import check_grads

from delta_jax.layers import MIXERS, Mixer, RMSNorm, l2_normalize
from delta_jax.testing import relative_error

SIZES = [1.0, 1e-9, 1e-15, 1e-30, 1e19, 1e30, 1e37]
WEIGHTS = np.cos(np.arange(24.0)).reshape(3, 8)


def entries(size, dtype=jnp.float32):
    return jnp.asarray(size * np.random.default_rng(0).standard_normal((3, 8)), dtype)


def wanted(x, eps, mean):
    """The normalised x and the gradient of its sum with weights."""
    x = np.asarray(x, np.float64)
    factor = x.shape[-1] if mean else 1.0
    length = np.sqrt((x**2).sum(-1, keepdims=True) / factor + eps)
    gradient = WEIGHTS / length - x * (WEIGHTS * x).sum(-1, keepdims=True) / (factor * length**3)
    return x / length, gradient


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("eps", [1e-6, 1e-60])
@pytest.mark.parametrize("mean", [False, True])
def test_entries_of_any_size(size, eps, mean):
    x = entries(size)
    norm = RMSNorm(8, eps=eps) if mean else lambda x: l2_normalize(x, eps)
    got, pull = jax.vjp(norm, x)
    value, gradient = wanted(x, eps, mean)
    np.testing.assert_allclose(got, value, rtol=1e-6, atol=1e-6 * np.abs(value).max())
    np.testing.assert_allclose(
        pull(jnp.asarray(WEIGHTS, jnp.float32))[0], gradient, rtol=1e-6, atol=max(1e-6 * np.abs(gradient).max(), 2e-38)
    )


def test_derivatives_of_any_order_and_in_both_directions():
    with jax.enable_x64(True):
        x = entries(1.0, jnp.float64)
        norm = RMSNorm(8, param_dtype=jnp.float64)
        for function in (l2_normalize, norm):
            check_grads(
                lambda x, function=function: function(jnp.asarray(x)),
                (x,),
                order=3,
                modes=("fwd", "rev"),
                atol=1e-6,
                rtol=1e-6,
            )


def test_what_is_not_finite_gives_nothing_and_takes_nothing():
    """Whatever comes back to it: it is left out by selection."""
    x = jnp.concatenate([entries(1.0), entries(1e30).at[0, 0].set(jnp.nan).at[1, 1].set(-jnp.inf)])
    d_y = jnp.concatenate([jnp.asarray(WEIGHTS, jnp.float32), jnp.full((2, 8), jnp.nan), jnp.zeros((1, 8))])

    def by_layer(x, scale):
        norm = RMSNorm(8)
        norm.scale[...] = scale
        return norm(x)

    for norm in (by_layer, lambda x, scale: l2_normalize(x)):
        (y, pull), (_, pull_clean) = (jax.vjp(norm, rows, jnp.ones(8)) for rows in (x, x[:3]))
        np.testing.assert_array_equal(np.isnan(y).all(1), [False, False, False, True, True, False])
        assert np.isfinite(y[5]).all()
        (d_x, d_scale), (clean, of_scale) = pull(d_y), pull_clean(d_y[:3])
        np.testing.assert_array_equal(d_x[3:5], np.zeros((2, 8)))
        np.testing.assert_allclose(d_x[:3], clean, rtol=1e-6)
        np.testing.assert_allclose(d_scale, of_scale, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_entries_below_float32(dtype):
    x = entries(2.0**13 if dtype == jnp.float16 else 1e30, dtype)
    for mean, norm in ((False, l2_normalize), (True, RMSNorm(8, eps=1e-6))):
        assert norm(x).dtype == dtype
        np.testing.assert_allclose(np.asarray(norm(x), np.float64), wanted(x, 1e-6, mean)[0], atol=0.01)


@pytest.mark.parametrize("eps", [1e-6, 1e-60])
def test_zero_stays_zero(eps):
    value, pull = jax.vjp(lambda x: l2_normalize(x, eps), jnp.zeros((2, 4)))
    np.testing.assert_array_equal(value, jnp.zeros((2, 4)))
    np.testing.assert_allclose(pull(jnp.ones((2, 4)))[0], min(eps**-0.5, 1e35), rtol=1e-6)


def test_float64_stays_float64():
    with jax.enable_x64(True):
        x = entries(1e100, jnp.float64)
        np.testing.assert_allclose(l2_normalize(x), wanted(x, 1e-6, False)[0], rtol=1e-14)


def test_a_step_size_for_keys_of_any_length():
    """Kaczmarz's values are divided by the length of the key."""
    layer = MIXERS["kaczmarz_linear_attention"](8, num_heads=2, head_dim=4, num_v_heads=4, rngs=nnx.Rngs(0))
    x, k = jnp.ones((1, 3, 8)), entries(1e30).reshape(1, 3, 2, 4)
    v = 1e30 * jnp.ones((1, 3, 4, 8))
    length = np.linalg.norm(np.asarray(k, np.float64), axis=-1).repeat(2, -1)[..., None]
    np.testing.assert_allclose(layer.rule_inputs(x, k, k, v).v, np.asarray(v, np.float64) / length, rtol=1e-6)


OPTIONS = {
    "latent_attention": {
        "num_heads": 2,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
    }
}


@jax.jit
def call(layer, x):
    return layer(x)


@pytest.mark.parametrize("name", MIXERS)
def test_float16_is_near_float32_on_a_thousand_similar_tokens(name):
    """Where nothing is forgotten the sums over tokens are beyond float16 before the output norm."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 1, 16)) + 0.05 * rng.standard_normal((1, 1024, 16))
    options = OPTIONS.get(name, {"num_heads": 2, "head_dim": 8}) | {"initializer_std": 0.3}
    if issubclass(MIXERS[name], Mixer):
        options |= {"implementation": "recurrent"}  # which compiles in less time than it takes the chunkwise form
    narrow, wide = (MIXERS[name](16, **options, dtype=dtype, rngs=nnx.Rngs(0)) for dtype in ("float16", "float32"))
    for size, limit in ((1.0, 5e-3), (3000.0, 5e-2)):  # the rounding of x itself, and of what gates make of it
        y = jnp.asarray(size * x, jnp.float16)
        assert relative_error(call(narrow, y), call(wide, y.astype(jnp.float32))) <= limit
