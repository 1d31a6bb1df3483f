"""Bad input is refused with one sentence that names the argument and what was wanted."""

import jax.numpy as jnp
import numpy as np
import pytest

from delta_jax import delta_product, delta_rule, delta_rule_step, linear_attention
from delta_jax.ops import implementations
from delta_jax.ops.attention import attend, rotate
from delta_jax.ops.segments import Positions, positions
from delta_jax.ops.short_convolution import short_convolution


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
    "q must be an array, as jnp.asarray makes one, got list": {"q": [[[[1.0] * 4] * 2] * 5] * 2},
    "q must be an array, got None": {"q": None},
    "q must be an array of numbers, got dtype object": {"q": np.full((2, 5, 2, 4), None)},
    "q must have one of the dtypes float32, bfloat16, float16, float64, got": {"q": np.ones((2, 5, 2, 4), np.int64)},
    "beta must be an array, as jnp.asarray makes one, got float": {"beta": 0.5},
    "beta must have shape (2, 5, 4), [batch, time, heads], got shape ()": {"beta": np.float32(0.5)},
    "beta must have shape (2, 5, 4), [batch, time, heads], got shape (2, 4, 5) and dtype float32; time comes before": {
        "beta": jnp.ones((2, 4, 5))
    },
    "g must have shape (2, 5, 4) or (2, 5, 4, 4), [batch, time, heads] or [batch, time, heads, key], got shape "
    "(2, 4, 5, 4) and dtype float32; time comes before the heads": {"g": jnp.ones((2, 4, 5, 4))},
    "v must have the batch and time of q, (2, 5), [batch, time, heads, value], got shape (2, 10, 2, 3) and dtype "
    "float32; time comes before the heads": {"v": jnp.ones((2, 10, 2, 3))},
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
    "chunk_size must be 16, 32, 64 or 128, got 16.0": {"chunk_size": 16.0},
    "chunk_size must be 16, 32, 64 or 128, got True": {"chunk_size": True},
    "scale must be a number or an array of no axes, got True": {"scale": True},
    "scale must be a number or an array of no axes, got '1'": {"scale": "1"},
    "scale must be a number or an array of no axes, got [1.0]": {"scale": [1.0]},
    "scale must be a number or an array of no axes, got 1j": {"scale": 1j},
    "scale must be a number or an array of no axes, got shape (4,) and dtype float32": {"scale": jnp.ones(4)},
    "scale must be a number or an array of no axes, got shape (1,) and dtype float32": {
        "scale": np.ones(1, np.float32)
    },
    "scale must be a number or an array of no axes, got shape () and dtype bool": {"scale": jnp.ones((), bool)},
    "scale must be a finite number, got nan": {"scale": float("nan")},
    "implementation='pallas' cannot run here: the Pallas kernels of mosaic_tpu run on TPUs, and this is a cpu; the": {
        "implementation": "pallas"
    },
    "implementation='triton' cannot run here: triton runs on GPUs, and this is a cpu.": {"implementation": "triton"},
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


HEADS_FIRST = {"q": (2, 2, 5, 4), "k": (2, 2, 5, 4), "v": (2, 2, 5, 3)}


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("beta", (2, 5, 2), "beta must have shape (2, 2, 5), [batch, time, heads]"),
        ("initial_state", (2, 2, 4, 3), "initial_state must have shape (2, 5, 4, 3), [batch, heads, key, value]"),
        ("segment_ids", (2, 5), "segment_ids must have shape (2, 2), [batch, time]"),
    ],
)
def test_heads_first_is_recognised_where_another_array_gives_it_away(name, shape, message):
    wrong = {key: jnp.ones(size) for key, size in HEADS_FIRST.items()}
    other = jnp.ones(shape, jnp.int32 if name == "segment_ids" else jnp.float32)
    with pytest.raises(ValueError) as error:
        delta_rule(**wrong, **{name: other})
    assert message in str(error.value)
    assert str(error.value).endswith("; time comes before the heads.")


def test_delta_product():
    q, k = jnp.ones((1, 3, 2, 4)), jnp.ones((1, 3, 2, 2, 4))
    with pytest.raises(ValueError, match=r"k must have shape \[batch, time, writes, key_heads, key\]"):
        delta_product(q, q, k)
    with pytest.raises(ValueError, match=r"beta must have shape \(1, 3, 2, 2\), \[batch, time, writes, heads\]"):
        delta_product(q, k, k, jnp.ones((1, 3, 2)))


ONE = jnp.ones((2, 5, 2, 4))
IDS = np.zeros((2, 5), np.int32)
OTHERS = {
    "x must have shape [batch, time, channels], got shape (5, 4)": lambda: short_convolution(
        jnp.ones((5, 4)), jnp.ones((3, 4))
    ),
    "x must have one of the dtypes": lambda: short_convolution(jnp.ones((2, 5, 4), jnp.int32), jnp.ones((3, 4))),
    "x must be an array, as jnp.asarray makes one, got list": lambda: short_convolution([[[1.0]]], jnp.ones((3, 1))),
    "kernel must have shape [width, channels=4], got shape (4, 3)": lambda: short_convolution(
        jnp.ones((2, 5, 4)), jnp.ones((4, 3))
    ),
    "segment_ids must be integers": lambda: short_convolution(
        jnp.ones((2, 5, 4)), jnp.ones((3, 4)), segment_ids=jnp.ones((2, 5))
    ),
    "cache must have shape [batch=2, tail=2, channels=4], got shape (3, 2, 4)": lambda: short_convolution(
        jnp.ones((2, 5, 4)), jnp.ones((3, 4)), cache=jnp.ones((3, 2, 4))
    ),
    "k must have shape [batch=2, keys, kv_heads, key=4]": lambda: attend(ONE, ONE[..., :3], ONE, scale=1.0),
    "q must have a multiple of the 2 heads of k": lambda: attend(ONE[:, :, :1], ONE, ONE, scale=1.0),
    "v must have at most the 3 channels of k": lambda: attend(ONE[..., :3], ONE[..., :3], ONE, scale=1.0),
    "v must have the dtype of q, float32, got bfloat16": lambda: attend(ONE, ONE, ONE.astype(jnp.bfloat16), scale=1.0),
    "window must be a positive integer, got True": lambda: attend(ONE, ONE, ONE, scale=1.0, window=True),
    "positions must be given where k has other tokens than q, got 5 and 3": lambda: attend(
        ONE[:, :3], ONE, ONE, scale=1.0
    ),
    "position of the keys' positions must have shape [batch=2, time=5]": lambda: attend(
        ONE, ONE, ONE, scale=1.0, positions=(Positions(IDS, IDS), Positions(IDS, IDS[:, :4]))
    ),
    "scale must be a number": lambda: attend(ONE, ONE, ONE, scale=jnp.ones(2)),
    "position must have shape [batch=2, time=5]": lambda: rotate(ONE, IDS[0], theta=10.0, channels=2),
    "position must be integers": lambda: rotate(ONE, jnp.ones((2, 5)), theta=10.0, channels=2),
    "channels must be an even number of the 4 channels of x, got 6": lambda: rotate(ONE, IDS, theta=10.0, channels=6),
    "theta must be a positive number, got True": lambda: rotate(ONE, IDS, theta=True, channels=2),
    "segment_ids must have shape [batch, time], got shape (5,)": lambda: positions(IDS[0]),
}


@pytest.mark.usefixtures("as_users_call")
@pytest.mark.parametrize("message", OTHERS)
def test_other_functions(message):
    with pytest.raises(ValueError) as error:
        OTHERS[message]()
    assert message in str(error.value)


@pytest.mark.usefixtures("as_users_call")
def test_arrays_of_numpy_are_taken():
    x = {name: np.asarray(array) for name, array in arguments().items()}
    want = delta_rule(**arguments(), implementation="recurrent")
    for got, wanted in zip(delta_rule(**x, implementation="recurrent"), want, strict=True):
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("state", None, "state must be an array, got None"),
        ("q_t", (2, 4), "q_t must have shape [batch, key_heads, key], got shape (2, 4)"),
        ("k_t", (2, 2, 8), "k_t must have the shape of q_t, (2, 2, 4), [batch, key_heads, key], got shape (2, 2, 8)"),
        ("v_t", (3, 4, 3), "v_t must have the batch of q_t, (2,)"),
        ("g_t", (2, 4, 3), "g_t must have shape (2, 4) or (2, 4, 4)"),
        (
            "state",
            (2, 4, 3, 4),
            "state must have shape (2, 4, 4, 3), [batch, heads, key, value], got shape (2, 4, 3, 4)",
        ),
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
        delta_rule_step(**(good | {name: None if shape is None else jnp.ones(shape)}))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("q", "v", "message"),
    [
        ((1, 4, 2, 80), (1, 4, 2, 64), "take key sizes of 64, 128, 192, 256, 384, 512, not 80"),
        ((1, 4, 2, 64), (1, 4, 2, 96), "take value sizes of 64, 128, 192, 256, 384, 512, not 96"),
        ((1, 4, 37, 64), (1, 4, 37, 64), "find no way to cut 37 heads of 64 and 64"),
    ],
)
@pytest.mark.parametrize("implementation", ["mosaic_tpu"])
def test_sizes_the_kernels_do_not_take(implementation, q, v, message):
    q, v = jnp.ones(q), jnp.ones(v)
    with pytest.raises(ValueError) as error:
        delta_rule(q, q, v, implementation=implementation)
    assert f"implementation='mosaic_tpu' cannot run here: the Pallas TPU kernels {message}" in str(error.value)
    with pytest.raises(ValueError, match="implementation='pallas' cannot run here: the Pallas TPU kernels"):
        delta_rule(q, q, v, implementation="pallas")
    assert delta_rule(q, q, v)[0].shape == v.shape  # the automatic choice finds another way


@pytest.mark.parametrize("implementation", ["mosaic_tpu"])
def test_dtypes_the_kernels_do_not_take(implementation):
    q = jnp.ones((1, 4, 2, 64), jnp.float16)
    with pytest.raises(ValueError, match="take bfloat16 and float32, not float16"):
        delta_rule(q, q, q, implementation=implementation)


def test_implementations_say_why_not():
    reasons = implementations()
    assert reasons["recurrent"] is None
    assert reasons["xla"] is None
    assert reasons["pallas"] == "; ".join(filter(None, (reasons[f"mosaic_{name}"] for name in ("tpu", "gpu", "mma"))))
    assert "run on TPUs, and this is a cpu" in reasons["mosaic_tpu"]
