import jax
import jax.numpy as jnp
import numpy as np
import pytest

from delta_jax.ops.short_convolution import short_convolution


def reference(x, kernel, segment_ids=None):
    """The definition, one product at a time in float64."""
    x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    y = np.zeros_like(x)
    width = len(kernel)
    for row in range(len(x)):
        for t in range(x.shape[1]):
            for j in range(min(width, t + 1)):
                if segment_ids is not None and len(set(segment_ids[row, t - j : t + 1].tolist())) > 1:
                    break
                y[row, t] += kernel[width - 1 - j] * x[row, t - j]
    return y


def inputs(time, width=4, channels=5, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(time), 2)
    x = jax.random.normal(keys[0], (3, time, channels), dtype)
    return x, jax.random.normal(keys[1], (width, channels))


SEGMENTS = np.array([[1] * 4 + [2] * 7, [5, 6, 6, 5, 5, 5, 6, 6, 6, 6, 5], [0] * 10 + [1]], np.int32)


@pytest.mark.parametrize(("time", "width"), [(11, 4), (2, 4), (1, 4), (6, 1), (5, 2)])
def test_matches_the_definition(time, width):
    x, kernel = inputs(time, width)
    y, cache = jax.jit(short_convolution)(x, kernel)
    np.testing.assert_allclose(y, reference(x, kernel), atol=2e-6)
    assert cache.shape == (3, width - 1, 5)


def test_segments_do_not_mix():
    x, kernel = inputs(11)
    y, _ = short_convolution(x, kernel, segment_ids=jnp.asarray(SEGMENTS))
    np.testing.assert_allclose(y, reference(x, kernel, SEGMENTS), atol=2e-6)
    assert np.abs(y - reference(x, kernel)).max() > 0.1


@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("sizes", [[1] * 11, [2, 1, 5, 3], [10, 1]])
def test_pieces_equal_the_whole(segmented, sizes):
    x, kernel = inputs(11)
    ids = jnp.asarray(SEGMENTS) if segmented else None
    whole, last = short_convolution(x, kernel, segment_ids=ids)
    cache, start, pieces = None, 0, []
    for size in sizes:
        stop = start + size
        if ids is None:
            part = None
        else:
            part = ids[:, start:stop]
            if start:
                same = (part[:, 0] == ids[:, start - 1])[:, None, None]
                cache = jnp.where(same, cache, 0.0)
        y, cache = short_convolution(x[:, start:stop], kernel, segment_ids=part, cache=cache)
        pieces.append(y)
        start = stop
    np.testing.assert_array_equal(jnp.concatenate(pieces, axis=1), whole)
    np.testing.assert_array_equal(cache, last)


def test_gradient_matches_differences():
    x, kernel = inputs(11)
    weights = jax.random.normal(jax.random.key(7), x.shape)

    def loss(x, kernel):
        return jnp.sum(weights * short_convolution(x, kernel, segment_ids=jnp.asarray(SEGMENTS))[0])

    dx, dkernel = jax.grad(loss, (0, 1))(x, kernel)
    direction = np.asarray(jax.random.normal(jax.random.key(8), kernel.shape), np.float64)
    # The loss is linear in each argument alone, so a difference of any size is exact.
    base = np.sum(np.asarray(weights, np.float64) * reference(x, direction, SEGMENTS))
    np.testing.assert_allclose(np.sum(np.asarray(dkernel, np.float64) * direction), base, rtol=1e-5)
    other = np.asarray(jax.random.normal(jax.random.key(9), x.shape), np.float64)
    base = np.sum(np.asarray(weights, np.float64) * reference(other, kernel, SEGMENTS))
    np.testing.assert_allclose(np.sum(np.asarray(dx, np.float64) * other), base, rtol=1e-5)


def test_bfloat16_sums_in_float32():
    x, kernel = inputs(11, dtype=jnp.bfloat16)
    y, cache = short_convolution(x, kernel)
    assert y.dtype == cache.dtype == jnp.bfloat16
    wanted = reference(x, kernel)
    assert np.abs(np.asarray(y, np.float64) - wanted).max() <= 2**-8 * np.abs(wanted).max()
    np.testing.assert_allclose(np.asarray(y, np.float64), wanted, rtol=2**-8, atol=1e-5)


def test_later_inputs_change_nothing():
    x, kernel = inputs(11)
    y, _ = short_convolution(x, kernel)
    changed, _ = short_convolution(x.at[:, 6:].set(9.0), kernel)
    np.testing.assert_array_equal(y[:, :6], changed[:, :6])
    assert np.abs(y[:, 6:] - changed[:, 6:]).max() > 0.1


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"kernel": jnp.zeros((4, 6))}, "kernel"),
        ({"cache": jnp.zeros((3, 4, 5))}, "cache"),
        ({"segment_ids": jnp.zeros((3, 4), jnp.int32)}, "segment_ids"),
    ],
)
def test_wrong_shapes_are_named(change, word):
    x, kernel = inputs(11)
    with pytest.raises(ValueError, match=word):
        short_convolution(x, **({"kernel": kernel} | change))


@pytest.mark.parametrize("poison", [np.nan, np.inf, 1e30])
def test_what_is_not_seen_reaches_no_output_cache_or_gradient(poison):
    """A loss over the tokens that no poison of their own segment comes before, within the kernel's width."""
    x, kernel = inputs(11)
    ids, bad = jnp.asarray(SEGMENTS), np.zeros((*SEGMENTS.shape, 5), bool)
    bad[0, 2, 1] = bad[1, 4] = bad[2, 10] = True
    runs = np.cumsum(np.diff(SEGMENTS, axis=1, prepend=SEGMENTS[:, :1]) != 0, axis=1)
    clean = np.ones(bad.shape, bool)
    for row, time, channel in np.argwhere(bad):
        late = slice(time, time + len(kernel))
        clean[row, late, channel] &= runs[row, late] != runs[row, time]
    assert clean[0, 3:, 0].all()
    cache = jnp.full((3, len(kernel) - 1, 5), poison)  # nothing of it is left to see in the second segment

    def run(x, cache):
        def loss(x, kernel, cache):
            y, new = short_convolution(x, kernel, segment_ids=ids, cache=cache)
            first = runs[..., None] == 0
            weights = jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
            return jnp.sum(y * weights, where=clean & ~first), (y, new)

        return jax.grad(loss, (0, 1, 2), has_aux=True)(x, kernel, cache)

    one, (y, new) = run(jnp.where(bad, poison, x), cache)
    other, (wanted, _) = run(x, jnp.zeros_like(cache))
    kept = clean & (runs[..., None] > 0)
    np.testing.assert_array_equal(np.asarray(y)[kept], np.asarray(wanted)[kept])
    assert np.isfinite(poison) or np.isnan(np.asarray(y)[~clean]).all()
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert np.isfinite(new[0]).all()


def test_lengths_leave_out_what_follows():
    """Outputs, cache and gradients are those of the shorter rows; a row without tokens keeps its cache."""
    x, kernel = inputs(11)
    ids, lengths = jnp.asarray(SEGMENTS), jnp.asarray([7, 1, 0])
    _, cache = short_convolution(x, kernel)
    padded = jnp.where(jnp.arange(11)[None, :, None] < lengths[:, None, None], x, jnp.nan)
    y, new = short_convolution(padded, kernel, segment_ids=ids, cache=cache, lengths=lengths)
    for row, length in enumerate([7, 1]):
        one = slice(row, row + 1)
        alone, last = short_convolution(x[one, :length], kernel, segment_ids=ids[one, :length], cache=cache[one])
        np.testing.assert_array_equal(y[row, :length], alone[0])
        np.testing.assert_array_equal(new[row], last[0])
    np.testing.assert_array_equal(new[2], cache[2])
    assert not np.any(y[2])
    gradient = jax.grad(lambda x: jnp.sum(short_convolution(x, kernel, lengths=lengths)[0]))(padded)
    assert np.isfinite(gradient).all()
    assert not np.any(gradient[2])
    with pytest.raises(ValueError, match=r"lengths must be integers, got shape \(3,\) and dtype float32"):
        short_convolution(x, kernel, lengths=jnp.ones(3))
