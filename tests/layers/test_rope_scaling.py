"""Stretched rotary embeddings against their formulas, written out pair by pair in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from delta_jax.layers import RopeScaling
from delta_jax.ops.attention import rotate

LLAMA = {"kind": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}
YARN = {"kind": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


def by_turns(pair, theta, channels, o):
    """The Llama 3 herd of models: by the wave length of the pair, in the words of its released code."""
    length, tokens = 2 * math.pi * theta ** (2 * pair / channels), o["original_max_position_embeddings"]
    low, high = o.get("low_freq_factor", 1.0), o.get("high_freq_factor", 4.0)
    if length < tokens / high:
        return 1.0
    if length > tokens / low:
        return 1 / o["factor"]
    smooth = (tokens / length - low) / (high - low)
    return (1 - smooth) / o["factor"] + smooth


def by_number(pair, theta, channels, o):
    """YaRN: the pairs that turn beta times within the tokens solve tokens = 2 pi beta theta^(2 pair / channels)."""
    tokens = o["original_max_position_embeddings"]

    def pair_of(turns):
        return channels / 2 * math.log(tokens / (2 * math.pi * turns), theta)

    first = max(math.floor(pair_of(o.get("beta_fast", 32.0))), 0)
    last = min(math.ceil(pair_of(o.get("beta_slow", 1.0))), channels - 1)
    if first == last:
        return 1.0 if pair <= first else 1 / o["factor"]
    interpolated = min(max((pair - first) / (last - first), 0), 1)
    return interpolated / o["factor"] + 1 - interpolated


FORMULAS = {"linear": lambda pair, theta, channels, o: 1 / o["factor"], "llama3": by_turns, "yarn": by_number}


@pytest.mark.parametrize(
    ("theta", "channels", "options"),
    [
        (1e4, 16, {"kind": "linear", "factor": 4.0}),
        (5e5, 128, LLAMA),
        (5e5, 64, LLAMA | {"factor": 32.0}),
        (1e4, 64, LLAMA | {"original_max_position_embeddings": 256, "low_freq_factor": 0.5, "high_freq_factor": 9.0}),
        (1e6, 128, YARN),
        (
            1e4,
            64,
            YARN | {"factor": 16.0, "original_max_position_embeddings": 2048, "beta_fast": 20.0, "beta_slow": 2.0},
        ),
        (1e4, 64, YARN | {"original_max_position_embeddings": 30}),  # no pair turns 32 times
        (1e4, 4, YARN | {"original_max_position_embeddings": 12, "beta_slow": 31.5}),
    ],
)
def test_angles_are_stretched_by_the_formulas(theta, channels, options):
    wanted = [FORMULAS[options["kind"]](pair, theta, channels, options) for pair in range(channels // 2)]
    factors = RopeScaling(**options).factors(theta=theta, channels=channels)
    np.testing.assert_allclose(factors, wanted, rtol=1e-6)
    assert factors.dtype == np.float32
    if options in (LLAMA, YARN):  # short wave lengths, long ones and some between
        assert (factors[0], factors[-1]) == (1.0, np.float32(1 / options["factor"]))
        assert len(set(factors)) > 4


def test_yarn_sharpens_attention():
    assert RopeScaling(**YARN).amplitude == pytest.approx(0.1 * math.log(4) + 1, rel=1e-12)
    assert RopeScaling(**YARN | {"factor": 1.0}).amplitude == 1.0
    assert RopeScaling(**YARN | {"attention_factor": 0.5}).amplitude == 0.5
    assert RopeScaling(**LLAMA).amplitude == RopeScaling(kind="linear", factor=2.0).amplitude == 1.0


@pytest.mark.parametrize("interleaved", [False, True])
def test_pairs_turn_as_complex_numbers(interleaved):
    x = jax.random.normal(jax.random.key(0), (1, 5, 2, 10))
    position, factors = jnp.array([[0, 1, 2, 7, 30]]), jnp.array([1.0, 0.7, 0.25, 0.1])
    got = rotate(x, position, theta=50.0, channels=8, interleaved=interleaved, factors=factors, amplitude=1.5)
    wide = np.asarray(x[..., :8], np.float64)
    one, other = (wide[..., ::2], wide[..., 1::2]) if interleaved else np.split(wide, 2, -1)
    angle = np.asarray(position[0])[:, None] * (50.0 ** (-np.arange(4) / 4) * np.asarray(factors, np.float64))
    turned = 1.5 * (one + 1j * other) * np.exp(1j * angle)[None, :, None]
    parts = [turned.real, turned.imag]
    wanted = np.stack(parts, -1).reshape(wide.shape) if interleaved else np.concatenate(parts, -1)
    np.testing.assert_allclose(got[..., :8], wanted, atol=5e-6)
    np.testing.assert_array_equal(got[..., 8:], x[..., 8:])
    with pytest.raises(ValueError, match=r"factors must have shape \[pairs=4\], got shape \(3,\)"):
        rotate(x, position, theta=50.0, channels=8, factors=jnp.ones(3))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "ntk", "factor": 2.0}, "kind: wanted one of 'linear', 'llama3', 'yarn', got 'ntk'"),
        ({"kind": "linear", "factor": 0.5}, "factor must be at least 1, got 0.5"),
        ({"kind": "linear", "factor": "2"}, "factor: wanted a number, got '2'"),
        ({"kind": "linear", "factor": 2.0, "beta_fast": 8.0}, "beta_fast is not for kind 'linear', got 8.0"),
        (YARN | {"low_freq_factor": 2.0}, "low_freq_factor is not for kind 'yarn', got 2.0"),
        (LLAMA | {"attention_factor": 1.0}, "attention_factor is not for kind 'llama3', got 1.0"),
        ({"kind": "llama3", "factor": 2.0}, "original_max_position_embeddings is missing, which llama3 needs"),
        (LLAMA | {"low_freq_factor": 4.0}, "low_freq_factor must be below high_freq_factor, got 4.0 and 4.0"),
        (YARN | {"beta_slow": 33}, "beta_slow must be below beta_fast, got 33.0 and 32.0"),
        (YARN | {"attention_factor": 0.0}, "attention_factor must be a positive number"),
        (YARN | {"original_max_position_embeddings": 0}, "original_max_position_embeddings must be a positive integer"),
    ],
)
def test_impossible_options_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        RopeScaling(**options)
