"""The triangular inverse where it is hard: equal and nearly equal keys, beta up to 2."""

import jax.numpy as jnp
import numpy as np
import pytest

from delta_jax.ops.inverse import unit_lower_inverse


@pytest.mark.parametrize("size", [1, 2, 16, 24, 63, 64, 128])
@pytest.mark.parametrize(("correlation", "beta"), [(0.0, 1.0), (1.0, 2.0), (3.0, 2.0), (10.0, 2.0), (np.inf, 2.0)])
def test_against_numpy_float64(size, correlation, beta):
    rng = np.random.default_rng(size)
    common = rng.standard_normal(128)
    keys = (
        common[None] + np.zeros((size, 1))
        if correlation == np.inf
        else rng.standard_normal((size, 128)) + correlation * common
    )
    keys /= np.linalg.norm(keys, axis=-1, keepdims=True)
    a = np.tril(beta * keys @ keys.T, -1).astype(np.float32)
    want = np.linalg.inv(np.eye(size) + a.astype(np.float64))
    got = unit_lower_inverse(jnp.asarray(a))
    # Row after row of forward substitution reaches 1e-7 * size here; a series in powers of `a` is off by 1e7 and more.
    assert np.abs(np.asarray(got) - want).max() <= 4e-7 * size * np.abs(want).max()


def test_only_the_strictly_lower_part_is_read():
    a = np.random.default_rng(0).standard_normal((3, 16, 16)).astype(np.float32)
    np.testing.assert_array_equal(unit_lower_inverse(jnp.asarray(a)), unit_lower_inverse(jnp.asarray(np.tril(a, -1))))
