"""A few tokens of one layer whose state lies among those of all."""

import contextlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from delta_jax import delta_product, delta_product_step, delta_rule, delta_rule_step, linear_attention_step
from delta_jax.testing import relative_error
from delta_jax.testing.trials import interpreted_tpu

LAYERS, BATCH, HEADS, SIZE = 3, 4, 2, 64


def _token(writes: int | None) -> dict[str, jax.Array]:
    random = np.random.default_rng(0)
    axes = (BATCH, *([] if writes is None else [writes]), HEADS)
    shapes = {"q_t": (BATCH, HEADS, SIZE), "k_t": (*axes, SIZE), "v_t": (*axes, SIZE), "beta_t": axes}
    token = {name: jnp.asarray(random.normal(size=shape), jnp.float32) / 8 for name, shape in shapes.items()}
    return token | {"g_t": -jnp.asarray(random.uniform(size=(BATCH, HEADS)), jnp.float32)}


@pytest.mark.parametrize("implementation", ["xla", "mosaic_tpu"])
def test_the_layer_meant_is_stepped_and_the_others_stay(implementation, monkeypatch):
    monkeypatch.setattr("pallas_kernels.tpu.step._LEAST", 2 * HEADS * SIZE**2 * 4)  # two rows a grid step
    token = _token(2)
    states = jnp.asarray(np.random.default_rng(1).normal(size=(LAYERS, BATCH, HEADS, SIZE, SIZE)), jnp.float32)

    def step(state, token, **options):
        return delta_product_step(**token, state=state, implementation=implementation, **options)

    o, new = jax.jit(step)(states, token, layer=jnp.int32(1))
    wanted = jax.jit(step)(states[1], token)
    jax.tree.map(np.testing.assert_array_equal, (o, new[1]), wanted)
    np.testing.assert_array_equal(new[::2], states[::2])

    both, layers = jnp.stack([states, 2 * states]), jnp.asarray([0, 2], jnp.int32)
    o, new = jax.vmap(lambda states, layer: step(states, token, layer=layer))(both, layers)
    for row, layer in enumerate(layers.tolist()):
        alone = step(both[row], token, layer=layers[row])
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), (o[row], new[row]), alone)
        assert not np.array_equal(new[row, layer], both[row, layer])


@pytest.mark.parametrize(
    ("implementation", "time", "segments"),
    [("xla", 3, False), ("mosaic_tpu", 3, False)]
    + [pytest.param("mosaic_tpu", *of, marks=pytest.mark.slow) for of in ((8, True), (9, False))],
)
def test_a_few_tokens_or_many_of_the_layer_meant(implementation, time, segments):
    """Two writes a token and a gate a channel; more tokens than are few, and packed ones, take the whole way."""
    random = np.random.default_rng(2)

    def normal(*shape):
        return jnp.asarray(random.normal(size=shape) / 8, jnp.float32)

    keys, values = (BATCH, time, 2, HEADS, SIZE), (BATCH, time, 2, 2 * HEADS, SIZE)
    arrays = normal(BATCH, time, HEADS, SIZE), normal(*keys), normal(*values), normal(*values[:-1])
    arrays += -jnp.abs(normal(BATCH, time, 2 * HEADS, SIZE)), normal(*values)
    states = normal(LAYERS, BATCH, 2 * HEADS, SIZE, SIZE)
    ids = jnp.asarray([[0] * (time - 2) + [1] * 2] * BATCH) if segments else None

    def run(state, implementation, **options):
        return delta_product(*arrays, initial_state=state, segment_ids=ids, implementation=implementation, **options)

    want, state = run(states[2], "recurrent")
    with contextlib.nullcontext() if implementation == "xla" else interpreted_tpu():
        o, new = jax.jit(partial(run, implementation=implementation))(states, layer=jnp.int32(2))
    assert relative_error(o, want) < 2e-6
    assert relative_error(new[2], state) < 2e-6
    np.testing.assert_array_equal(new[:2], states[:2])


@pytest.mark.parametrize("step", [delta_rule_step, linear_attention_step])
def test_mistakes_are_named(step):
    token = _token(None)
    token = token if step is delta_rule_step else {name: x for name, x in token.items() if name != "beta_t"}
    states = jnp.zeros((LAYERS, BATCH, HEADS, SIZE, SIZE))
    with pytest.raises(
        ValueError, match=r"state must have shape \(3, 4, 2, 64, 64\).*\[layers, batch, heads, key, value\]"
    ):
        step(**token, state=states[:, :1], layer=jnp.int32(0))
    with pytest.raises(ValueError, match="state must have shape"):
        step(**token, state=states[0], layer=jnp.int32(0))
    with pytest.raises(ValueError, match="layer must be integers"):
        step(**token, state=states, layer=jnp.ones(()))
    with pytest.raises(ValueError, match="layer must be an array"):
        step(**token, state=states, layer=1)


def test_a_layer_needs_the_states_of_all():
    x = jnp.ones((1, 2, 1, 4))
    with pytest.raises(ValueError, match="initial_state must be an array, got None"):
        delta_rule(x, x, x, layer=jnp.int32(0))
    with pytest.raises(ValueError, match=r"initial_state must have shape \(1, 1, 1, 4, 4\)"):
        delta_rule(x, x, x, initial_state=jnp.ones((1, 1, 4, 4)), layer=jnp.int32(0))
