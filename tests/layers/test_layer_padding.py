"""Padding in every mixer: as if it were not there, whatever it holds; and what is not finite stays where it is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from delta_jax.layers import MIXERS, DeltaNet, RMSNorm, SwiGLU

HIDDEN, TIME, REAL = 12, 10, 6
SMALL = {"num_heads": 2, "head_dim": 4, "expand_v": 1.0, "implementation": "recurrent", "initializer_std": 0.4}
OPTIONS = {
    "attention": {"num_heads": 2, "window": 4, "use_output_gate": True, "initializer_std": 0.4},
    "latent_attention": {
        "num_heads": 2,
        "kv_lora_rank": 6,
        "qk_nope_head_dim": 4,
        "qk_rope_head_dim": 2,
        "v_head_dim": 5,
    },
    "linear_attention": SMALL | {"use_short_conv": True},
    "mamba2": SMALL | {"num_heads": 1, "num_v_heads": 3},
}
MASK = np.zeros((4, TIME), bool)
MASK[0, -REAL:] = MASK[1, :REAL] = MASK[2, [0, 1, 4, 5, 8, 9]] = True  # the last row is padding alone
IDS = np.array([0, 0, 0, 5, 5, 5], np.int32)  # the cache's segment, and another

mixers = pytest.mark.parametrize("name", MIXERS)


@functools.cache
def make(name, **options):
    return MIXERS[name](HIDDEN, **(OPTIONS.get(name, SMALL) | options), rngs=nnx.Rngs(0))


def inputs(seed, time):
    return jax.random.normal(jax.random.key(seed), (4, time, HIDDEN))


@jax.jit
def call(layer, x, segment_ids, mask, cache):
    return layer(x, segment_ids=segment_ids, mask=mask, cache=cache)


def padded(x, filler):
    """The tokens of x [4, REAL, ...] where MASK is true; the last row has none."""
    full = np.full((4, TIME, *x.shape[2:]), filler, x.dtype)
    full[MASK] = np.asarray(x[:3]).reshape(-1, *x.shape[2:])
    return jnp.asarray(full)


def close(one, other, rows=slice(None), atol=1e-5):
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(left[rows], right[rows], atol=atol)


@mixers
def test_padding_is_as_if_it_were_not_there(name):
    """On the left, on the right, between, and alone; behind a cache; before a step."""
    layer, x, ids = make(name), inputs(1, REAL), jnp.broadcast_to(IDS, (4, REAL))
    _, old = call(layer, x, jnp.zeros_like(ids), None, layer.init_cache(4, length=3 * TIME))
    wanted, last = call(layer, x, ids, None, old)
    y, cache = call(layer, padded(x, np.nan), padded(ids, 9), jnp.asarray(MASK), old)
    np.testing.assert_allclose(np.asarray(y)[MASK], wanted[:3].reshape(-1, HIDDEN), atol=1e-5)
    np.testing.assert_array_equal(np.asarray(y)[~MASK], 0.0)
    close(cache, last, slice(3))
    close(cache, old, slice(3, None), atol=0)
    np.testing.assert_array_equal(cache.position, [3, 3, 3, REAL])

    token, there = inputs(2, 1), jnp.asarray([[True], [True], [False], [True]])
    step, after = call(layer, token.at[2].set(jnp.nan), None, there, cache)
    wanted, follows = call(
        layer, token, None, jnp.ones_like(there), jax.tree.map(lambda a, b: a.at[:3].set(b[:3]), old, last)
    )
    close(step, wanted, np.array([0, 1, 3]))
    close(after, follows, np.array([0, 1, 3]))
    close(after, cache, 2, atol=0)
    assert not np.any(step[2])


@pytest.mark.parametrize("name", ["gated_delta_product", "mamba2", "attention", "latent_attention"])
def test_gradients_are_those_without_padding(name):
    layer, x, weights = make(name), inputs(1, REAL)[:3], inputs(3, REAL)[:3]

    @jax.jit
    def gradients(layer, x, mask, weights):
        return jax.grad(lambda layer, x: jnp.sum(weights * layer(x, mask=mask)), argnums=(0, 1))(layer, x)

    one, d_x = gradients(layer, padded(x, np.nan)[:3], jnp.asarray(MASK[:3]), padded(weights, 1.0)[:3])
    other, wanted = gradients(layer, x, None, weights)
    np.testing.assert_allclose(np.asarray(d_x)[MASK[:3]], wanted.reshape(-1, HIDDEN), atol=1e-5)
    np.testing.assert_array_equal(np.asarray(d_x)[~MASK[:3]], 0.0)
    close(one, other, atol=5e-5)


class Weighed(DeltaNet):
    """Has a parameter that keys are multiplied with."""

    def __init__(self, hidden_size, **options):
        super().__init__(hidden_size, **options)
        self.weight = nnx.Param(jnp.full((4,), 0.5))

    def rule_inputs(self, x, q, k, v):
        inputs = super().rule_inputs(x, q, k, v)
        return inputs._replace(k=k * self.weight[...][None, None, None])


@pytest.mark.parametrize(
    ("name", "poison"),
    [(name, poison) for name in ("attention", "latent_attention") for poison in (np.nan, np.inf, 1e30)]
    + [
        (name, np.nan)
        for name in ("kimi_delta_attention", "gated_delta_net_2", "kaczmarz_linear_attention", "mamba2", "weighed")
    ],
)
def test_poison_stays_in_its_segment_and_after_it(name, poison):
    """Outputs, and all gradients of a loss over the others: earlier tokens and other segments."""
    op = {} if name in ("attention", "latent_attention") else {"implementation": "xla"}
    layer = Weighed(HIDDEN, **SMALL | op, rngs=nnx.Rngs(0)) if name == "weighed" else make(name, **op)
    x = inputs(1, TIME)
    ids = jnp.asarray([[1] * 6 + [2] * 4, [1] * 2 + [3] * 4 + [1] * 4] * 2)
    bad = np.zeros((4, TIME), bool)
    bad[0, 4], bad[1, 2:6], bad[2, 9] = True, True, True
    clean = np.ones((4, TIME), bool)
    clean[0, 4:6], clean[1, 2:6], clean[2, 9] = False, False, False

    @jax.jit
    def run(layer, x):
        def loss(layer, x):
            y = layer(x, segment_ids=ids)
            return jnp.sum(y * jnp.cos(inputs(3, TIME)), where=clean[..., None]), y

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(layer, x)

    (_, y), gradients = run(layer, jnp.where(bad[..., None], poison, x))
    (_, wanted_y), wanted = run(layer, x)
    if not op:
        np.testing.assert_array_equal(np.asarray(y)[clean], np.asarray(wanted_y)[clean])
    np.testing.assert_allclose(np.asarray(y)[clean], np.asarray(wanted_y)[clean], atol=1e-6)
    if not np.isfinite(poison):
        assert np.isnan(np.asarray(y)[~clean]).all()
    close(gradients, wanted, atol=1e-4)
    assert not np.any(np.asarray(gradients[1])[bad])


@pytest.mark.parametrize("name", ["attention", "latent_attention"])
def test_what_lies_in_unused_slots_of_a_cache_reaches_nothing(name):
    """In a prefill, in a step, and after a change of segment, in which the whole cache is of another one."""
    layer, x = make(name, window=None) if name == "attention" else make(name), inputs(1, TIME)
    cache = layer.init_cache(4, length=TIME)
    dirty = cache._replace(entries=jax.tree.map(lambda a: jnp.full_like(a, jnp.nan), cache.entries))
    ids = jnp.asarray([[1] * 5, [0] * 5, [0, 0, 2, 2, 2], [0] * 5])

    def run(layer, x, cache):
        first, cache = layer(x[:, :5], segment_ids=ids, cache=cache)
        second, _ = layer(x[:, 5:6], cache=cache)
        third, _ = layer(x[:, 6:7], segment_ids=jnp.full((4, 1), 8), cache=jax.tree.map(poisoned, cache))
        return first, second, third

    def poisoned(a):
        return jnp.full_like(a, jnp.nan) if jnp.issubdtype(a.dtype, jnp.floating) else a

    @jax.jit
    def gradients_and_outputs(layer, x, cache):
        def loss(layer):
            outputs = run(layer, x, cache)
            return sum(jnp.sum(y) for y in outputs), outputs

        return jax.grad(loss, has_aux=True)(layer)

    close(gradients_and_outputs(layer, x, dirty), gradients_and_outputs(layer, x, cache), atol=1e-6)


@pytest.mark.parametrize("poison", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize("layer", [RMSNorm(HIDDEN), SwiGLU(HIDDEN, 7, initializer_std=0.4, rngs=nnx.Rngs(0))])
def test_a_token_reaches_no_other_by_way_of_shared_parameters(layer, poison):
    x = inputs(1, 3)

    @jax.jit
    def run(layer, x):
        return jax.grad(lambda layer, x: jnp.sum(jnp.sin(layer(x)[:, 1:])), argnums=(0, 1))(layer, x)

    for one, other in zip(
        jax.tree.leaves(run(layer, x.at[:, 0].set(poison))), jax.tree.leaves(run(layer, x)), strict=True
    ):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_a_padded_call_has_room_for_its_real_tokens():
    layer, cache = make("latent_attention"), make("latent_attention").init_cache(4, length=REAL)
    y, cache = call(layer, padded(inputs(1, REAL), 0.0), None, jnp.asarray(MASK), cache)
    assert np.isfinite(y).all()
    with pytest.raises(ValueError, match="cache has room for 6 tokens of a segment and holds 6, but 1 more are given"):
        layer(inputs(1, 2), mask=jnp.asarray([[True, False]] * 4), cache=cache)
    with pytest.raises(
        ValueError, match=r"mask must be bool \[batch, time\], here \[4, 2\], true for real tokens, got float32"
    ):
        layer(inputs(1, 2), mask=jnp.ones((4, 2)))
