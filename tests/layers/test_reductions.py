"""Members that are one another at certain parameters, and the size of one that has no preset."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from delta_jax.layers import MIXERS, l2_normalize
from delta_jax.models import LanguageModel, MixerSpec, ModelConfig, number_of_parameters
from delta_jax.testing import relative_error

HIDDEN, HEADS, DIM = 16, 2, 8
# The recurrence compiles in a fraction of the time; that the op's forms agree is its own contract.
COMMON = {"num_heads": HEADS, "head_dim": DIM, "expand_v": 1.0, "use_output_gate": False, "initializer_std": 0.3}
COMMON |= {"implementation": "recurrent"}


def make(name, **options):
    return MIXERS[name](HIDDEN, **(COMMON | options), rngs=nnx.Rngs(1))


def share(source, target):
    """Copies every parameter that both layers have, by name."""
    own = dict(nnx.to_flat_state(nnx.state(target)))
    for path, value in nnx.to_flat_state(nnx.state(source)):
        if path in own and own[path].shape == value.shape:
            own[path][...] = value[...]


def assert_equal(one, other, limit=2e-6):
    """Outputs, and gradients of all that both learn under the same name."""
    x = jax.random.normal(jax.random.key(0), (2, 21, HIDDEN))
    weights = jax.random.normal(jax.random.key(1), (2, 21, HIDDEN))

    def run(layer):
        def loss(layer):
            y = layer(x)
            return jnp.sum(weights * y), y

        gradients, y = jax.jit(jax.grad(loss, has_aux=True))(layer)
        flat = dict(nnx.to_flat_state(nnx.state(gradients)))
        return {"y": y} | {name: flat[(f"{name}_proj", "kernel")][...] for name in ("q", "k", "v", "o")}

    left, right = run(one), run(other)
    for name, a in left.items():
        error = relative_error(right[name], a)
        assert error <= limit, (name, error)


@pytest.mark.parametrize(
    ("name", "one_write"), [("delta_net", "delta_product"), ("gated_delta_net", "gated_delta_product")]
)
def test_delta_product_of_one_write_is_the_delta_rule(name, one_write):
    layer = make(name, allow_negative_eigenvalues=True, implementation="xla")
    product = make(one_write, num_householder=1, implementation="xla")
    share(layer, product)
    assert_equal(product, layer, 0.0)


def channel_gate(kimi, gated):
    """Gives all channels of a head the gate of the head."""
    kimi.f_proj.down.kernel[...] = jnp.zeros((HIDDEN, DIM)).at[:, :HEADS].set(gated.a_proj.kernel[...])
    kimi.f_proj.up.kernel[...] = jnp.zeros((DIM, HEADS * DIM)).at[:HEADS].set(jnp.repeat(jnp.eye(HEADS), DIM, axis=1))
    kimi.dt_bias[...] = jnp.repeat(gated.dt_bias[...], DIM)


@pytest.mark.parametrize("negative", [False, True])
def test_kimi_delta_attention_with_one_gate_a_head_is_gated_delta_net(negative):
    gated = make("gated_delta_net", allow_negative_eigenvalues=negative)
    kimi = make("kimi_delta_attention", allow_negative_eigenvalues=negative)
    share(gated, kimi)
    channel_gate(kimi, gated)
    assert_equal(kimi, gated)


@pytest.mark.parametrize("bound", [None, -5.0])
def test_kimi_delta_attention_without_a_gate_is_delta_net(bound):
    delta, kimi = make("delta_net"), make("kimi_delta_attention", gate_lower_bound=bound)
    share(delta, kimi)
    kimi.dt_bias[...] = jnp.full((HEADS * DIM,), -1e4)
    assert_equal(kimi, delta)


def test_gated_delta_net_2_with_tied_gates_is_kimi_delta_attention():
    kimi, second = make("kimi_delta_attention"), make("gated_delta_net_2")
    share(kimi, second)
    for name in ("b_proj", "w_proj"):
        getattr(second, name).kernel[...] = jnp.repeat(kimi.b_proj.kernel[...], DIM, axis=1)
    assert_equal(second, kimi)


def test_kaczmarz_is_gated_delta_net_with_a_rescaled_value():
    kaczmarz, gated = make("kaczmarz_linear_attention"), make("gated_delta_net")
    share(kaczmarz, gated)
    own = gated.rule_inputs

    def rescaled(x, q, k, v):
        return own(x, l2_normalize(q), l2_normalize(k), v / jnp.sqrt(jnp.sum(k**2, -1, keepdims=True) + 1e-6))

    gated.rule_inputs, gated.unit_qk = rescaled, False
    x = jax.random.normal(jax.random.key(0), (2, 21, HIDDEN))
    np.testing.assert_allclose(kaczmarz(x), gated(x), rtol=1e-5, atol=2e-6)


def test_the_products_of_kaczmarz_stay_bounded_where_its_definition_does_not():
    """Keys of lengths from 1e-4 to 1e4 side by side: the products beta_i k_i k_j of the definition span as much."""
    layer = make("kaczmarz_linear_attention")
    k = jax.random.normal(jax.random.key(2), (1, 9, HEADS, DIM)) * 10.0 ** jnp.arange(-4.0, 5.0)[None, :, None, None]
    inputs = layer.rule_inputs(jnp.zeros((1, 9, HIDDEN)), k, k, jnp.ones((1, 9, HEADS, DIM)))
    np.testing.assert_allclose(inputs.k, l2_normalize(k))
    assert jnp.abs(inputs.beta[..., None] * inputs.k).max() <= 1


def test_parameters_of_kimi_delta_attention():
    pattern = (MixerSpec(mixer="kimi_delta_attention", options=(("num_heads", 8),)),)
    config = ModelConfig(vocab_size=32000, hidden_size=1024, num_layers=24, pattern=pattern)
    model = jax.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))
    assert abs(number_of_parameters(model) / 1e6 - 387.0) < 0.06
