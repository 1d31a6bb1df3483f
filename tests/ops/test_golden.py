"""Six tokens worked out by hand-checkable formulas: printed values of every member, and of all gradients of one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from delta_jax import delta_product, delta_rule


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def golden_inputs():
    t, i, j = np.arange(6)[:, None], np.arange(3)[None], np.arange(2)[None]

    def unit(x):
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    values = {
        "q": unit(np.sin(1 + 0.9 * t + 1.7 * i)),
        "k": unit(np.cos(0.3 + 1.1 * t + 0.6 * i)),
        "v": np.sin(0.5 + 0.4 * t + 2.1 * j),
        "beta": (1 + 0.9 * np.sin(2 * t + 0.2))[:, 0],
        "g_head": (-0.1 - 0.2 * (1 + np.sin(3 * t)))[:, 0],
        "g_channel": -0.05 - 0.1 * (1 + np.sin(t + 2 * i)),
        "b": sigmoid(np.sin(t + i)),
        "w": sigmoid(np.cos(2 * t + j)),
    }
    values = {name: jnp.asarray(x)[None, :, None] for name, x in values.items()}
    return values | {"s0": jnp.asarray(0.1 * (i.T - j))[None, None]}


GOLDEN = {
    "delta_net": (
        [2.259942925041, -1.281311633574],
        5.114314144177,
        [-0.8434218673805, 0.5209526055173, 0.9986224121923, -0.5404737910124, 2.5267520296571, -1.4130971428129],
    ),
    "gated_delta_net": (
        [1.179138023239, -0.900418823828],
        3.891603364563,
        [-0.4277208369011, 0.2038112077720, 0.5342057651867, -0.5006207858166, 1.3148626378730, -1.0301715359690],
    ),
    "kimi_delta_attention": (
        [1.603321625353, -1.155150640509],
        4.254607457973,
        [-0.6601329026111, 0.4074366353196, 0.6327302575968, -0.5479613167522, 1.8256188921112, -1.2654201517683],
    ),
    "gated_delta_net_2": (
        [0.367426227889, -0.414971710527],
        0.964513199931,
        [-0.3876259621506, 0.0855113899894, -0.0151986010290, -0.2484471806320, 0.3393160207756, -0.4585409374440],
    ),
    "gated_delta_product": (  # three tokens of two writes each
        [1.857978628688, -1.290849969471],
        2.450685654338,
        [-0.6953970981655, 0.4169905063852, 0.8238855442384, -0.6247814339372, 2.0699622261895, -1.4482992443107],
    ),
}


def run(member, x, implementation):
    gate = {"delta_net": None, "gated_delta_net": x["g_head"]}.get(member, x["g_channel"])
    options = {"initial_state": x["s0"], "scale": 1.0, "implementation": implementation}
    if member == "gated_delta_net_2":
        return delta_rule(x["q"], x["k"], x["w"] * x["v"], None, gate, x["b"] * x["k"], **options)
    if member == "gated_delta_product":
        k, v, beta = (a.reshape(1, 3, 2, *a.shape[2:]) for a in (x["k"], x["v"], x["beta"]))
        return delta_product(x["q"][:, 1::2], k, v, beta, x["g_head"][:, :3], **options)
    return delta_rule(x["q"], x["k"], x["v"], x["beta"], gate, **options)


@pytest.mark.parametrize("implementation", ["recurrent", "xla"])
@pytest.mark.parametrize("member", GOLDEN)
def test_outputs_and_state(member, implementation):
    last, total, state = GOLDEN[member]
    o, final = run(member, golden_inputs(), implementation)
    np.testing.assert_allclose(o[0, -1, 0], last, atol=1e-11)
    np.testing.assert_allclose(o.sum(), total, atol=1e-11)
    np.testing.assert_allclose(final.ravel(), state, atol=1e-11)


@pytest.mark.parametrize("implementation", ["recurrent", "xla"])
def test_gradients(implementation):
    """Sum, Frobenius norm and first entry of every gradient of Gated DeltaNet-2."""
    golden = {
        "q": (-1.020058724301, 0.585740164925, 0.099715244088),
        "k": (0.349997442811, 0.992996491200, 0.144298888949),
        "v": (2.812641512678, 1.377979027992, 0.093781523415),
        "b": (0.607018931852, 0.370274768483, 0.001649245287),
        "w": (-0.177911287295, 2.736726879362, 0.061501579612),
        "g_channel": (-0.659319307644, 0.409286413222, -0.009592660690),
        "s0": (0.074353568135, 0.384359908797, 0.229409290620),
    }
    x = golden_inputs()

    def loss(x):
        o, state = run("gated_delta_net_2", x, implementation)
        t, j = np.arange(6)[:, None], np.arange(2)[None]
        return jnp.sum(jnp.asarray(0.3 + 0.1 * t - 0.2 * j)[None, :, None] * o) + state.sum()

    value, gradient = jax.value_and_grad(loss)(x)
    np.testing.assert_allclose(value, -0.042638554749, atol=1e-11)
    for name, (total, norm, first) in golden.items():
        got = [gradient[name].sum(), jnp.linalg.norm(gradient[name].ravel()), gradient[name].ravel()[0]]
        np.testing.assert_allclose(got, [total, norm, first], atol=2e-11, err_msg=name)
