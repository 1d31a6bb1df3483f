"""A scale that is an array: traced, learned, differentiable, and as exact as one that is a number."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from delta_jax import delta_product, delta_rule, delta_rule_step, linear_attention
from delta_jax.ops.attention import attend
from delta_jax.testing import draw, relative_error


def inputs(dtype=jnp.float32, time=40, shape=(1, 2, 4, 8, 8)):
    x = draw(np.random.default_rng(0), time, shape)
    return {name: jnp.asarray(x[name], dtype) for name in ("q", "k", "v", "beta")}


def assert_close(got, want, limit):
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert relative_error(x, y) <= limit


@pytest.mark.parametrize("implementation", ["recurrent", "xla", "mosaic_tpu"])
def test_values_and_gradients(implementation):
    x = inputs(**({"shape": (1, 1, 1, 64, 64)} if implementation == "mosaic_tpu" else {}))

    def loss(x, scale, implementation):
        o, state = delta_rule(**x, scale=scale, implementation=implementation)
        return jnp.sum(jnp.sin(o)) + jnp.sum(state**2)

    value, (gradients, of_scale) = jax.value_and_grad(loss, (0, 1))(x, jnp.float32(0.3), implementation)
    assert_close((value, gradients), jax.value_and_grad(loss)(x, 0.3, "recurrent"), 2e-6)
    o, _ = delta_rule(**x, scale=1.0, implementation="recurrent")  # in which the output is linear
    np.testing.assert_allclose(of_scale, jnp.vdot(o, jnp.cos(0.3 * o)), rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_no_bit_is_lost_below_float32(dtype):
    """Float16 would not hold what these queries and this scale are multiplied to."""
    x = inputs(dtype) | {"q": inputs()["q"].astype(dtype) * jnp.asarray(100.0, dtype)}
    x["v"] = x["v"] * jnp.asarray(1e-3, dtype)
    want, _ = delta_rule(**x, scale=2000.0, implementation="xla")
    got, _ = delta_rule(**x, scale=jnp.float32(2000.0), implementation="xla")
    assert jnp.isfinite(want).all()
    np.testing.assert_array_equal(got, want)


class Parameter:
    """What holds an array in the way of `nnx.Param`; the op's tests run without flax."""

    def __jax_array__(self):
        return jnp.float32(0.5)


@pytest.mark.usefixtures("as_users_call")
def test_whatever_holds_a_number():
    x = inputs(time=5)
    want, _ = delta_rule(**x, scale=0.5, implementation="recurrent")
    for scale in (np.float32(0.5), np.array(0.5), jnp.bfloat16(0.5), Parameter()):
        assert_close(delta_rule(**x, scale=scale, implementation="recurrent")[0], want, 2e-7)
    scales = jnp.array([0.5, 1.0])
    both = jax.vmap(lambda scale: delta_rule(**x, scale=scale, implementation="recurrent")[0])(scales)
    assert_close(both, jnp.stack([want, 2 * want]), 2e-7)


def test_the_other_functions():
    x = inputs(time=5)
    q, k, v, beta = x.values()
    token = {f"{name}_t": a[:, 0] for name, a in x.items()} | {"state": jnp.ones((1, 4, 8, 8))}
    writes = (a[:, :, None] for a in (k, v, beta))
    options = {"implementation": "recurrent"}
    functions = {
        "linear_attention": partial(linear_attention, q, k, v, **options),
        "delta_product": partial(delta_product, q, *writes, **options),
        "delta_rule_step": partial(delta_rule_step, **token),
        "attend": partial(attend, jnp.repeat(q, 2, 2), jnp.repeat(k, 2, 2), v),
    }
    for function in functions.values():
        result, pull = jax.vjp(lambda scale, f=function: jax.tree.leaves(f(scale=scale))[0], jnp.float32(0.5))
        assert_close(result, jax.tree.leaves(function(scale=0.5))[0], 1e-6)
        assert float(pull(result)[0]) > 0.0
