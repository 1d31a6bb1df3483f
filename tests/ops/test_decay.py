"""Stages of the chunkwise form against their plain definitions in numpy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from delta_jax.ops.decay import chunk_decay, decayed_scores, decayed_scores_backward

SIZE, KEY = 32, 12


def gates(kind, channels):
    rng = np.random.default_rng(2)
    g = -np.exp(rng.standard_normal((SIZE, channels)) - 2)
    if kind == "-1e4 in the middle":
        g[SIZE // 3] = -1e4
    if kind == "-500 a chunk":
        g[:] = -500 / SIZE * rng.uniform(0.5, 1.5, g.shape)
    return g.astype(np.float32)


def span(g, i, j):
    """Sum of g over the tokens after j, up to and including i."""
    return g[j + 1 : i + 1].astype(np.float64).sum(0)


@pytest.mark.parametrize("kind", ["ordinary", "-1e4 in the middle", "-500 a chunk"])
@pytest.mark.parametrize("channels", [1, KEY])
@pytest.mark.parametrize("writes", [1, 3])
def test_factors_and_scores(kind, channels, writes):
    rng = np.random.default_rng(0)
    g = gates(kind, channels)
    rows, keys = (rng.standard_normal(s).astype(np.float32) for s in ((2, SIZE, KEY), (writes, SIZE, KEY)))
    decay = chunk_decay(jnp.asarray(g))
    for i in range(SIZE):
        np.testing.assert_allclose(decay.start[i], np.exp(span(g, i, -1)), rtol=5e-6, atol=1e-37)
        np.testing.assert_allclose(decay.end[i], np.exp(span(g, SIZE - 1, i)), rtol=5e-6, atol=1e-37)
    want = np.zeros((2, SIZE, writes, SIZE))
    for i in range(SIZE):
        for j in range(i + 1):
            want[:, i, :, j] = (rows[:, i].astype(np.float64)[:, None] * keys[:, j] * np.exp(span(g, i, j))).sum(-1)
    got = np.asarray(decayed_scores(jnp.asarray(rows), jnp.asarray(keys), decay))
    assert np.abs(got - want).max() <= 2e-6 * np.abs(want).max()
    assert not np.moveaxis(got, 2, 1)[..., ~np.tril(np.ones((SIZE, SIZE), bool))].any()


@pytest.mark.parametrize("channels", [1, KEY])
@pytest.mark.parametrize("writes", [1, 3])
def test_backward_is_the_gradient_of_the_forward(channels, writes):
    rng = np.random.default_rng(1)
    with jax.enable_x64(True):
        g = jnp.asarray(gates("ordinary", channels), jnp.float64)
        rows, keys = (jnp.asarray(rng.standard_normal(s)) for s in ((2, SIZE, KEY), (writes, SIZE, KEY)))
        d_scores = jnp.asarray(np.moveaxis(np.tril(rng.standard_normal((2, writes, SIZE, SIZE))), 1, 2))

        def scores_of(rows, keys, g):
            total = jnp.cumsum(g, 0)
            d = jnp.exp(total[:, None] - total[None]) * np.tril(np.ones((SIZE, SIZE)))[..., None]
            return jnp.einsum("rid,wjd,ijd->riwj", rows, keys, jnp.broadcast_to(d, (SIZE, SIZE, KEY)))

        want = jax.vjp(scores_of, rows, keys, g)[1](d_scores)
        decay = chunk_decay(g)
        got = decayed_scores_backward(d_scores, decayed_scores(rows, keys, decay), rows, keys, decay)
        for x, y in zip(got, want, strict=True):
            np.testing.assert_allclose(x, y, atol=1e-12)
