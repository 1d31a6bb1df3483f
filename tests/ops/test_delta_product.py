"""Several writes a token, beside what the contract suite says of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from delta_jax import delta_product, delta_product_step, delta_rule
from delta_jax.testing import draw, evaluate, problem, reference, relative_error

TIME = 21


def inputs(writes, gate="gate_head", dtype=jnp.float32, time=TIME):
    """Independent writes, each with an erase key of its own."""
    x = draw(np.random.default_rng(3), time)
    more = [draw(np.random.default_rng(n), time) for n in range(writes)]
    stacks = {name: np.stack([y[name] for y in more], 2) for name in ("k", "v", "beta")}
    stacks["erase"] = np.stack([y["erase_gate"] * y["k"] for y in more], 2)
    x = stacks | {"q": x["q"], "g": x[gate], "initial_state": x["initial_state"]}
    return {name: jnp.asarray(a, dtype) for name, a in x.items()}


def interleaved(x, segment_ids, **options):
    """The same as one long delta rule: a gate on the first write, a query on the last, zeros elsewhere."""
    writes = x["k"].shape[2]

    def place(a, where):
        zeros = jnp.zeros((*a.shape[:2], writes, *a.shape[2:]), a.dtype)
        return zeros.at[:, :, where].set(a).reshape(a.shape[0], -1, *a.shape[2:])

    flat = {name: x[name].reshape(x[name].shape[0], -1, *x[name].shape[3:]) for name in ("k", "v", "beta", "erase")}
    flat |= {"q": place(x["q"], -1), "g": place(x["g"], 0), "initial_state": x["initial_state"]}
    o, state = delta_rule(**flat, segment_ids=jnp.repeat(segment_ids, writes, axis=1), **options)
    return o[:, writes - 1 :: writes], state


def value_and_gradients(function, x):
    (o, state), vjp = jax.vjp(function, x)
    return o, state, vjp((jnp.cos(o), jnp.sin(state)))


@pytest.mark.parametrize("writes", [2, 5])
@pytest.mark.parametrize("gate", ["gate_head", "gate_channel"])
def test_equals_the_interleaved_delta_rule(writes, gate):
    segment_ids = jnp.asarray(np.repeat([4, 4, 1, 4], [6, 1, 9, 5])[None].repeat(2, 0))
    with jax.enable_x64(True):
        x = inputs(writes, gate, jnp.float64)
        want = value_and_gradients(jax.jit(lambda x: interleaved(x, segment_ids, implementation="recurrent")), x)
        for implementation in ("recurrent", "xla"):
            op = jax.jit(lambda x, i=implementation: delta_product(**x, segment_ids=segment_ids, implementation=i))
            for got, wanted in zip(jax.tree.leaves(value_and_gradients(op, x)), jax.tree.leaves(want), strict=True):
                assert relative_error(got, wanted) < 1e-12


@pytest.mark.parametrize("implementation", ["recurrent", "xla"])
def test_one_write_is_the_delta_rule_bit_for_bit(implementation):
    x = inputs(1)
    one = x | {name: x[name][:, :, 0] for name in ("k", "v", "beta", "erase")}
    got = value_and_gradients(jax.jit(lambda x: delta_product(**x, implementation=implementation)), x)
    want = value_and_gradients(jax.jit(lambda x: delta_rule(**x, implementation=implementation)), one)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(np.asarray(a).reshape(b.shape), b)


def test_vmap_and_defaults():
    x = {name: a for name, a in inputs(3).items() if name in ("q", "k", "v")}
    stacked = jax.tree.map(lambda a: jnp.stack([a, 0.5 * a]), x)
    got = jax.vmap(lambda x: delta_product(**x)[0])(stacked)
    for n in range(2):
        one = jax.tree.map(lambda a, n=n: a[n], stacked)
        explicit = one | {"beta": jnp.ones(x["v"].shape[:-1]), "erase": one["k"]}
        want, _ = delta_product(**explicit, scale=x["k"].shape[-1] ** -0.5, implementation="recurrent")
        assert relative_error(got[n], want) < 2e-6


@pytest.mark.parametrize("implementation", ["mosaic_tpu"])
def test_on_the_kernels(implementation):
    """They see one write after the other; 50 tokens are two tiles of 128 writes."""
    options = {"time": 50, "shape": (1, 1, 2, 64, 64)}
    values, cotangents = problem("gated_delta_product", **options)
    segment_ids = np.repeat([0, 1], [31, 19])[None]
    got = evaluate(
        "gated_delta_product", values, np.float32, cotangents, implementation=implementation, segment_ids=segment_ids
    )
    for name, x in reference("gated_delta_product", values, cotangents, segment_ids=segment_ids).items():
        assert relative_error(got[name], x) <= (1e-5 if name.startswith("d_") else 2e-6), name
    token = {f"{name}_t": jnp.asarray(x[:, 0], jnp.float32) for name, x in values.items() if name != "initial_state"}
    state = jnp.asarray(values["initial_state"], jnp.float32)
    want = delta_product_step(**token, state=state, implementation="recurrent")
    for a, b in zip(delta_product_step(**token, state=state, implementation=implementation), want, strict=True):
        assert relative_error(a, b) < 1e-6


def test_the_backward_keeps_little():
    """Residuals: the inputs and a state every 128 writes, nothing a write."""
    shape, writes, time = (1, 2, 2, 32, 32), 4, 512
    x = draw(np.random.default_rng(0), time, shape)
    x = {name: jnp.asarray(x[name], jnp.float32) for name in ("q", "k", "v", "beta")}
    x |= {name: jnp.stack([x[name]] * writes, 2) for name in ("k", "v", "beta")}
    saved = jax.eval_shape(lambda x: jax.vjp(lambda x: delta_product(**x, implementation="xla"), x)[1], x)
    extra = sum(a.size for a in jax.tree.leaves(saved)) - sum(a.size for a in jax.tree.leaves(x))
    assert extra <= 2 * time * writes // 128 * 2 * 32 * 32


BAD = {
    "k must have shape [batch, time, writes, key_heads, key]": {"k": (2, 5, 2, 4)},
    "k must hold at least one write a token": {"k": (2, 5, 0, 2, 4)},
    "k must have the shape of q, (2, 5, 2, 4) and an axis of writes before the heads": {"k": (2, 5, 3, 2, 8)},
    "v must have the batch and time and writes of k, (2, 5, 3)": {"v": (2, 5, 2, 4, 3)},
    "beta must have shape (2, 5, 3, 4)": {"beta": (2, 5, 4)},
    "erase must have shape (2, 5, 3, 2, 4) or (2, 5, 3, 4, 4)": {"erase": (2, 5, 2, 4)},
    "g must have shape (2, 5, 4) or (2, 5, 4, 4)": {"g": (2, 5, 3, 4)},
}


@pytest.mark.parametrize("message", BAD)
def test_wrong_shapes_are_named(message):
    good = {"q": (2, 5, 2, 4), "k": (2, 5, 3, 2, 4), "v": (2, 5, 3, 4, 3)}
    arguments = {name: jnp.ones(shape) for name, shape in (good | BAD[message]).items()}
    with pytest.raises(ValueError) as error:
        delta_product(**arguments)
    assert message in str(error.value)


def test_wrong_shapes_of_a_step_are_named():
    with pytest.raises(ValueError) as error:
        delta_product_step(jnp.ones((2, 2, 4)), jnp.ones((2, 2, 4)), jnp.ones((2, 2, 4)), state=jnp.ones((2, 2, 4, 4)))
    assert "k_t must have shape [batch, writes, key_heads, key], got shape (2, 2, 4)" in str(error.value)
