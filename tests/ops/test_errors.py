"""Bad input is refused with one sentence that names the argument and what was wanted."""

import jax.numpy as jnp
import pytest

from delta_jax import delta_rule, delta_rule_step, linear_attention
from delta_jax.ops import implementations


def arguments(**changes):
    shapes = {
        "q": (2, 5, 2, 4),
        "k": (2, 5, 2, 4),
        "v": (2, 5, 4, 3),
        "beta": (2, 5, 4),
        "g": (2, 5, 4),
        "erase": (2, 5, 2, 4),
        "initial_state": (2, 4, 4, 3),
    }
    return {name: jnp.ones(shape) for name, shape in shapes.items()} | changes


BAD = {
    "q must have shape [batch, time, key_heads, key]": {"q": jnp.ones((5, 2, 4))},
    "q must have one of the dtypes": {"q": jnp.ones((2, 5, 2, 4), jnp.int32)},
    "q must hold at least one token": {"q": jnp.ones((2, 0, 2, 4))},
    "k must have the shape of q": {"k": jnp.ones((2, 5, 2, 8))},
    "k must have the dtype of q": {"k": jnp.ones((2, 5, 2, 4), jnp.bfloat16)},
    "v must have a number of heads that is a multiple of the 2 key heads": {"v": jnp.ones((2, 5, 3, 3))},
    "v must have the batch and time of q": {"v": jnp.ones((2, 6, 4, 3))},
    "beta must have shape (2, 5, 4)": {"beta": jnp.ones((2, 5, 2))},
    "beta must have dtype": {"beta": jnp.ones((2, 5, 4), jnp.float16)},
    "g must have shape (2, 5, 4) or (2, 5, 4, 4)": {"g": jnp.ones((2, 5, 4, 3))},
    "erase must have shape (2, 5, 2, 4) or (2, 5, 4, 4)": {"erase": jnp.ones((2, 5, 1, 4))},
    "initial_state must have shape (2, 4, 4, 3)": {"initial_state": jnp.ones((2, 2, 4, 3))},
    "segment_ids must have shape (2, 5)": {"segment_ids": jnp.ones((2, 4), jnp.int32)},
    "segment_ids must be integers": {"segment_ids": jnp.ones((2, 5))},
    "chunk_size must be 16, 32, 64 or 128, got 24": {"chunk_size": 24},
    "implementation='pallas' cannot run here: the Pallas kernels run on TPUs and on Hopper GPUs, and this is a cpu": {
        "implementation": "pallas"
    },
    "implementation='fast' cannot run here: the names are": {"implementation": "fast"},
}


@pytest.mark.parametrize("message", BAD)
def test_delta_rule(message):
    with pytest.raises(ValueError) as error:
        delta_rule(**arguments(**BAD[message]))
    assert message in str(error.value)


def test_linear_attention():
    with pytest.raises(ValueError, match="v must have a number of heads"):
        linear_attention(jnp.ones((1, 3, 2, 4)), jnp.ones((1, 3, 2, 4)), jnp.ones((1, 3, 3, 4)))


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("q_t", (2, 4), "q_t must have shape [batch, key_heads, key], got shape (2, 4)"),
        ("k_t", (2, 2, 8), "k_t must have the shape of q_t, (2, 2, 4), got shape (2, 2, 8)"),
        ("v_t", (3, 4, 3), "v_t must have the batch of q_t, (2,)"),
        ("g_t", (2, 4, 3), "g_t must have shape (2, 4) or (2, 4, 4)"),
        ("state", (2, 4, 3, 4), "state must have shape (2, 4, 4, 3), got shape (2, 4, 3, 4)"),
    ],
)
def test_step(name, shape, message):
    good = {
        "q_t": jnp.ones((2, 2, 4)),
        "k_t": jnp.ones((2, 2, 4)),
        "v_t": jnp.ones((2, 4, 3)),
        "state": jnp.ones((2, 4, 4, 3)),
    }
    with pytest.raises(ValueError) as error:
        delta_rule_step(**(good | {name: jnp.ones(shape)}))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("q", "v", "message"),
    [
        ((1, 4, 2, 80), (1, 4, 2, 64), "take key sizes of 64, 128, 192, 256, 384, 512, not 80"),
        ((1, 4, 2, 64), (1, 4, 2, 96), "take value sizes of 64, 128, 192, 256, 384, 512, not 96"),
        ((1, 4, 37, 64), (1, 4, 37, 64), "find no way to cut 37 heads of 64 and 64"),
    ],
)
@pytest.mark.parametrize("implementation", ["pallas"])
def test_sizes_the_kernels_do_not_take(implementation, q, v, message):
    q, v = jnp.ones(q), jnp.ones(v)
    with pytest.raises(ValueError) as error:
        delta_rule(q, q, v, implementation=implementation)
    assert f"implementation='pallas' cannot run here: the Pallas TPU kernels {message}" in str(error.value)
    assert delta_rule(q, q, v)[0].shape == v.shape  # the automatic choice finds another way


@pytest.mark.parametrize("implementation", ["pallas"])
def test_dtypes_the_kernels_do_not_take(implementation):
    q = jnp.ones((1, 4, 2, 64), jnp.float16)
    with pytest.raises(ValueError, match="take bfloat16 and float32, not float16"):
        delta_rule(q, q, q, implementation=implementation)


def test_implementations_say_why_not():
    reasons = implementations()
    assert reasons["recurrent"] is None
    assert reasons["xla"] is None
    assert "Pallas" in reasons["pallas"]
