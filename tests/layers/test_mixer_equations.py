"""Each layer against its equations, written out again in numpy float64 with the layer's own parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from delta_jax.layers import MIXERS, DeltaNet, GatedDeltaNet, RMSNorm, SwiGLU, l2_normalize
from delta_jax.testing import relative_error


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


def elu_and_one(x):
    return np.where(x > 0, x + 1, np.exp(x))


def stream(p, x, name, member, o):
    y = x @ p[f"{name}_proj/kernel"]
    kinds = {"silu": silu, "relu": lambda y: np.maximum(y, 0), "elu": elu_and_one, "identity": lambda y: y}
    activation = kinds[o.get("qk_activation", "silu") if name in "qk" else "silu"]
    if f"{name}_conv/kernel" in p:
        return activation(convolve(y, p[f"{name}_conv/kernel"]) + p.get(f"{name}_conv/bias", 0.0))
    plain = member in ("linear_attention", "gated_linear_attention", "retnet") and o.get("feature_map") != "l2"
    return y if plain else activation(y)


def softplus(x):
    return np.log1p(np.exp(x))


def unit(x):
    return x / np.sqrt(np.sum(x**2, axis=-1, keepdims=True) + 1e-6)


def of_sum_one(x):
    total = np.sum(x, axis=-1, keepdims=True)
    return x / np.where(total == 0, 1, total)


def low_rank(p, x, name):
    """Or of full rank, as the parameters say."""
    if f"{name}/kernel" in p:
        return x @ p[f"{name}/kernel"]
    y = x @ p[f"{name}/down/kernel"] @ p[f"{name}/up/kernel"]
    return y + p.get(f"{name}/up/bias", 0.0)


def turned(x, theta=1e4):
    """Rotary embedding of x [time, heads, channels]."""
    half = x.shape[-1] // 2
    angle = np.arange(len(x))[:, None] / theta ** (np.arange(half) / half)
    pairs = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)[:, None]
    return np.concatenate([pairs.real, pairs.imag], -1)


def member_inputs(name, p, x, q, k, v, o):
    """q, k, v, beta, log decay and erase key of every token and value head; k, v, beta, erase of every write of it."""
    time, writes, heads, _ = v.shape
    groups = o["num_heads"]
    double = 2.0 if o.get("allow_negative_eigenvalues", name.endswith("delta_product")) else 1.0
    beta, g = np.ones((time, writes, heads)), np.zeros((time, heads, k.shape[-1]))
    if "b_proj/kernel" in p and name != "gated_delta_net_2":
        beta = double * sigmoid(x @ p["b_proj/kernel"] + p.get("b_proj/bias", 0.0)).reshape(beta.shape)
    if name == "delta_net" and not o.get("use_beta", True):
        beta = double * beta
    if name in ("delta_net", "gated_delta_net", "delta_product", "gated_delta_product"):
        q, k = ((of_sum_one if o.get("qk_norm") == "sum" else unit)(y) for y in (q, k))
    if "a_proj/kernel" in p:
        g = g - (np.exp(p["A_log"]) * softplus(x @ p["a_proj/kernel"] + p["dt_bias"]))[..., None]
    erase = k
    if name == "kaczmarz_linear_attention":  # as the paper has it, not as it is computed
        q = unit(q)
        beta = beta / (np.sum(k**2, -1).repeat(heads // groups, -1) + 1e-6)
    if name in ("kimi_delta_attention", "gated_delta_net_2"):
        q, k = unit(q), unit(k)
        gated = (time, heads if name == "kimi_delta_attention" else groups, k.shape[-1])
        f = low_rank(p, x, "f_proj").reshape(gated) + p["dt_bias"].reshape(gated[1:])
        rate = np.exp(p["A_log"])[:, None]
        bound = o.get("gate_lower_bound")
        g = -rate * softplus(f) if bound is None else bound * sigmoid(rate * f)
        g, erase = g.repeat(heads // gated[1], 1), k
    if name == "gated_delta_net_2":
        erase = double * sigmoid(x @ p["b_proj/kernel"]).reshape(k.shape) * k
        v = sigmoid(x @ p["w_proj/kernel"]).reshape(v.shape) * v
    if name == "gated_linear_attention":
        g = (np.log(sigmoid(low_rank(p, x, "f_proj"))) / 16).reshape(g.shape)
    if name == "linear_attention":
        plain = o.get("feature_map") != "l2"
        q, k = (elu_and_one(y) if plain else unit(y) for y in (q, k))
    if name == "retnet":
        q, k = turned(q), turned(k[:, 0])[:, None]
        g = g + np.log(1 - 2.0 ** (-5 - np.arange(heads)))[None, :, None]
    if name == "mamba2":
        v = softplus(x @ p["a_proj/kernel"] + p["dt_bias"])[:, None, :, None] * v
    if name in ("linear_attention", "gated_linear_attention", "retnet", "mamba2"):
        erase = 0 * k
    return q, k, v, beta, g, erase


def forward(name, p, x, o):
    """One sequence x [T, d] through the member with parameters p and options o, token by token in float64."""
    time, heads, v_heads = len(x), o["num_heads"], o.get("num_v_heads", o["num_heads"])
    q = stream(p, x, "q", name, o).reshape(time, heads, -1)
    k = stream(p, x, "k", name, o).reshape(time, -1, heads, q.shape[-1])
    v = stream(p, x, "v", name, o).reshape(time, k.shape[1], v_heads, -1)
    raw = v
    q, k, v, beta, g, erase = member_inputs(name, p, x, q, k, v, o)
    out = np.zeros((time, v_heads, v.shape[-1]))
    scale = 1.0 if name == "mamba2" else q.shape[-1] ** -0.5
    for h in range(v_heads):
        state, own = np.zeros((q.shape[-1], v.shape[-1])), h // (v_heads // heads)
        for t in range(time):
            state = np.exp(g[t, h])[:, None] * state
            for j in range(k.shape[1]):
                write = v[t, j, h] - erase[t, j, own] @ state
                state = state + beta[t, j, h] * np.outer(k[t, j, own], write)
            out[t, h] = scale * state.T @ q[t, own]
    gate = low_rank(p, x, "g_proj") if any(path.startswith("g_proj") for path in p) else None
    usual = "sigmoid" if name == "kimi_delta_attention" else "silu"
    activation = {"silu": silu, "sigmoid": sigmoid}[o.get("output_gate_activation", usual)]
    if name == "mamba2":
        out = (out + p["D"][:, None] * raw[:, 0]).reshape(time, 1, -1)
        out = out if gate is None else out * activation(gate)[:, None]
        gate = None
    if "norm_groups" in o:
        out = out.reshape(time, o["norm_groups"], -1)
        p = p | {"o_norm/scale": p["o_norm/scale"].reshape(o["norm_groups"], -1)}
    if o.get("use_output_norm", True):
        eps = o.get("output_norm_eps", o["norm_eps"])
        out = out / np.sqrt(np.mean(out**2, axis=-1, keepdims=True) + eps) * p["o_norm/scale"]
    out = out.reshape(time, -1)
    return (out if gate is None else out * activation(gate)) @ p["o_proj/kernel"]


CASES = [
    ("delta_net", {}),
    ("delta_net", {"use_output_gate": True, "num_v_heads": 4, "expand_v": 2.0, "norm_eps": 1e-3}),
    ("delta_net", {"use_short_conv": False, "allow_negative_eigenvalues": True}),
    (
        "delta_net",
        {"use_beta": False, "use_output_norm": False, "qk_activation": "elu", "qk_norm": "sum", "conv_bias": True},
    ),
    (
        "delta_net",
        {"use_beta": False, "allow_negative_eigenvalues": True, "qk_activation": "relu", "qk_norm": "sum"}
        | {"use_short_conv": False, "head_dim": 2, "use_output_norm": False, "use_output_gate": True},
    ),
    ("delta_net", {"qk_activation": "identity", "use_output_gate": True, "output_gate_activation": "sigmoid"}),
    ("delta_product", {"num_householder": 3, "use_output_gate": False}),
    ("delta_product", {"output_gate_activation": "sigmoid", "conv_bias": True, "output_norm_eps": 1e-2}),
    ("gated_delta_net", {"conv_size": 2, "expand_v": 0.5}),
    ("gated_delta_net", {"output_gate_activation": "sigmoid", "conv_bias": True, "output_norm_eps": 1e-2}),
    ("gated_delta_net", {"num_v_heads": 4, "allow_negative_eigenvalues": True, "use_short_conv": False}),
    ("gated_delta_product", {"num_householder": 2, "num_v_heads": 4, "allow_negative_eigenvalues": False}),
    ("kaczmarz_linear_attention", {"num_v_heads": 4, "allow_negative_eigenvalues": True}),
    ("kimi_delta_attention", {"num_v_heads": 4, "output_gate_activation": "sigmoid"}),
    ("kimi_delta_attention", {"gate_lower_bound": -5.0, "output_gate_activation": "silu"}),
    ("kimi_delta_attention", {"use_output_gate_bias": False, "conv_bias": True, "output_norm_eps": 1e-2}),
    ("kimi_delta_attention", {"use_low_rank_gates": False, "num_v_heads": 4, "gate_lower_bound": -5.0}),
    ("gated_delta_net_2", {"num_v_heads": 4, "expand_v": 2.0}),
    ("gated_delta_net_2", {"output_gate_activation": "sigmoid", "allow_negative_eigenvalues": True}),
    ("linear_attention", {"use_output_gate": True}),
    ("linear_attention", {"feature_map": "l2"}),
    ("linear_attention", {"feature_map": "l2", "use_short_conv": True}),
    ("gated_linear_attention", {"num_v_heads": 4}),
    ("retnet", {"expand_v": 2.0}),
    ("mamba2", {"num_v_heads": 4, "expand_v": 0.5}),
    ("mamba2", {"num_v_heads": 4, "norm_groups": 3}),
    (
        "mamba2",
        {"num_v_heads": 4, "conv_bias": False, "output_gate_activation": "sigmoid", "output_norm_eps": 1e-2},
    ),
]


@pytest.mark.parametrize(("name", "options"), CASES)
def test_layer_computes_its_equations(name, options):
    options = {"num_heads": 2, "head_dim": 6, "expand_v": 1.0, "norm_eps": 1e-5} | options
    layer = MIXERS[name](12, **options, initializer_std=0.4, rngs=nnx.Rngs(3))
    for path, value in nnx.to_flat_state(nnx.state(layer)):
        if path[-1] in ("scale", "bias", "D"):  # they begin at zero or one
            value[...] = value[...] + jnp.linspace(-0.5, 0.5, value.size, dtype=value.dtype)
    x = jax.random.normal(jax.random.key(1), (2, 37, 12))
    y = jax.jit(lambda layer, x: layer(x))(layer, x)
    wanted = np.stack([forward(name, parameters(layer), np.asarray(row, np.float64), options) for row in x])
    assert relative_error(y, wanted) < 3e-6


def test_parameters_that_options_add_and_leave_out():
    def paths(name, **options):
        layer = jax.eval_shape(lambda: MIXERS[name](8, num_heads=2, head_dim=4, **options, rngs=nnx.Rngs(0)))
        return {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(layer))}

    kda, net = paths("kimi_delta_attention"), paths("delta_net")
    assert kda - paths("kimi_delta_attention", use_output_gate_bias=False) == {"g_proj/up/bias"}
    full = paths("kimi_delta_attention", use_low_rank_gates=False)
    assert {path for path in full if path[:2] in ("f_", "g_")} == {"f_proj/kernel", "g_proj/kernel"}
    assert net - paths("delta_net", use_beta=False, use_output_norm=False) == {"b_proj/kernel", "o_norm/scale"}
    biases = {f"{name}_conv/bias" for name in "qkv"}
    for name in MIXERS:
        if name not in ("attention", "latent_attention"):
            with_bias = paths(name, conv_bias=True, use_short_conv=True)
            assert with_bias - paths(name, conv_bias=False, use_short_conv=True) == biases
    assert biases <= paths("mamba2")


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
