"""Each layer against its equations, written out again in numpy float64 with the layer's own parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from delta_jax.layers import DeltaNet, GatedDeltaNet, RMSNorm, SwiGLU, l2_normalize


def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def parameters(layer):
    flat = nnx.to_flat_state(nnx.state(layer))
    return {"/".join(map(str, path)): np.asarray(value[...], np.float64) for path, value in flat}


def convolve(x, kernel):
    padded = np.concatenate([np.zeros((len(kernel) - 1, x.shape[1])), x])
    return np.stack([np.sum(kernel * padded[t : t + len(kernel)], axis=0) for t in range(len(x))])


def stream(p, x, name):
    y = x @ p[f"{name}_proj/kernel"]
    return silu(convolve(y, p[f"{name}_conv/kernel"]) if f"{name}_conv/kernel" in p else y)


def forward(p, x, *, heads, v_heads, key, value, beta_scale, eps):
    """One sequence x [T, d]; the decay and the gate are there if their parameters are."""
    time = len(x)
    q, k = (stream(p, x, name).reshape(time, heads, key) for name in "qk")
    q, k = (y / np.sqrt(np.sum(y**2, axis=-1, keepdims=True) + 1e-6) for y in (q, k))
    v = stream(p, x, "v").reshape(time, v_heads, value)
    beta = beta_scale * sigmoid(x @ p["b_proj/kernel"])
    decay = np.ones((time, v_heads))
    if "A_log" in p:
        decay = np.exp(-np.exp(p["A_log"]) * np.log1p(np.exp(x @ p["a_proj/kernel"] + p["dt_bias"])))
    o = np.zeros((time, v_heads, value))
    for h in range(v_heads):
        state = np.zeros((key, value))
        for t in range(time):
            kt, qt, b = k[t, h // (v_heads // heads)], q[t, h // (v_heads // heads)], beta[t, h]
            state = decay[t, h] * (state - b * np.outer(kt, kt @ state)) + b * np.outer(kt, v[t, h])
            o[t, h] = state.T @ qt / np.sqrt(key)
    o = o / np.sqrt(np.mean(o**2, axis=-1, keepdims=True) + eps) * p["o_norm/scale"]
    o = o.reshape(time, -1)
    if "g_proj/kernel" in p:
        o = o * silu(x @ p["g_proj/kernel"])
    return o @ p["o_proj/kernel"]


@pytest.mark.parametrize("member", [DeltaNet, GatedDeltaNet])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_output_gate": True, "num_v_heads": 4, "expand_v": 2.0, "norm_eps": 1e-3},
        {"use_short_conv": False, "allow_negative_eigenvalues": True, "use_output_gate": False},
        {"conv_size": 2, "expand_v": 0.5},
    ],
)
def test_layer_computes_its_equations(member, options):
    options = {"num_heads": 2, "head_dim": 6, "expand_v": 1.0, "norm_eps": 1e-5} | options
    layer = member(12, **options, initializer_std=0.4, rngs=nnx.Rngs(3))
    layer.o_norm.scale[...] = jnp.linspace(0.5, 1.5, layer.value_dim)
    x = jax.random.normal(jax.random.key(1), (2, 37, 12))
    y = np.asarray(jax.jit(lambda layer, x: layer(x))(layer, x))
    for row in range(2):
        wanted = forward(
            parameters(layer),
            np.asarray(x[row], np.float64),
            heads=2,
            v_heads=options.get("num_v_heads", 2),
            key=6,
            value=layer.value_dim,
            beta_scale=2.0 if options.get("allow_negative_eigenvalues") else 1.0,
            eps=options["norm_eps"],
        )
        error = np.sqrt(np.mean((y[row] - wanted) ** 2) / np.mean(wanted**2))
        assert error < 3e-6


def test_defaults_are_those_of_the_papers():
    delta = jax.eval_shape(lambda: DeltaNet(1024, rngs=nnx.Rngs(0)))
    assert (delta.num_heads, delta.key_dim, delta.value_dim) == (4, 256, 256)
    assert not delta.use_output_gate
    gated = jax.eval_shape(lambda: GatedDeltaNet(2048, rngs=nnx.Rngs(0)))
    assert (gated.num_heads, gated.key_dim, gated.value_dim) == (6, 256, 512)
    assert gated.use_output_gate
    assert gated.A_log.dtype == gated.dt_bias.dtype == jnp.float32


def test_gated_delta_net_begins_with_the_decays_of_its_paper():
    layer = GatedDeltaNet(4, num_heads=2000, head_dim=1, param_dtype=jnp.bfloat16, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert layer.A_log.dtype == layer.dt_bias.dtype == jnp.float32
    rate, step = np.exp(layer.A_log[...]), np.log1p(np.exp(layer.dt_bias[...]))
    assert rate.min() > 0
    assert rate.max() <= 16.0001
    np.testing.assert_allclose(rate.mean(), 8.0, atol=0.4)
    assert step.min() > 0.00099
    assert step.max() < 0.1001
    np.testing.assert_allclose(np.log(step).mean(), np.log(0.01), atol=0.1)
    assert layer.q_proj.kernel.dtype == jnp.bfloat16


def test_matrices_begin_with_the_standard_deviation_asked_for():
    layer = DeltaNet(128, use_output_gate=True, rngs=nnx.Rngs(0))
    for name, value in parameters(layer).items():
        if name == "o_norm/scale":
            assert (value == 1).all()
        else:
            np.testing.assert_allclose(value.std(), 0.02, rtol=0.1, err_msg=name)
            assert abs(value.mean()) < 0.003, name


def test_norms_compute_in_float32():
    x = jax.random.normal(jax.random.key(0), (3, 5, 64), jnp.bfloat16) * 100
    norm = RMSNorm(64, eps=1e-6)
    norm.scale[...] = jnp.linspace(0.5, 2.0, 64)
    wide = np.asarray(x, np.float64)
    wanted = wide / np.sqrt(np.mean(wide**2, axis=-1, keepdims=True) + 1e-6) * np.linspace(0.5, 2.0, 64)
    assert norm(x).dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(norm(x), np.float64), wanted, rtol=2**-8)
    np.testing.assert_allclose(norm(x.astype(jnp.float32)), wanted, rtol=2e-6)
    lengths = np.linalg.norm(np.asarray(l2_normalize(x.astype(jnp.float32)), np.float64), axis=-1)
    np.testing.assert_allclose(lengths, 1.0, rtol=1e-6)
    np.testing.assert_array_equal(l2_normalize(jnp.zeros((2, 4))), jnp.zeros((2, 4)))


def test_swiglu_computes_its_equation():
    layer = SwiGLU(6, 10, initializer_std=0.5, rngs=nnx.Rngs(0))
    p, x = parameters(layer), jax.random.normal(jax.random.key(1), (2, 3, 6))
    wide = np.asarray(x, np.float64)
    wanted = (silu(wide @ p["gate_proj/kernel"]) * (wide @ p["up_proj/kernel"])) @ p["down_proj/kernel"]
    np.testing.assert_allclose(layer(x), wanted, rtol=1e-5, atol=1e-6)
