"""A few tokens of several short convolutions, where their tails lie among those of all layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from delta_jax.ops.prologue import step_by_kernel
from delta_jax.ops.short_convolution import short_convolution
from delta_jax.testing import relative_error
from delta_jax.testing.trials import interpreted_tpu

LAYERS, WIDTH = 3, 4
# Channels, heads of unit length, whether there is a bias, activation.
STREAMS = [(128, 2, False, "silu"), (192, 1, True, "silu"), (320, None, True, "identity")]


def problem(batch, dtype=jnp.float32, seed=0, time=1):
    random = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(random.standard_normal(shape), dtype)

    channels = [c for c, *_ in STREAMS]
    streams, kernels = [normal(batch, time, c) for c in channels], [normal(WIDTH, c) for c in channels]
    biases = [normal(c) if bias else None for c, _, bias, _ in STREAMS]
    return streams, kernels, biases, [normal(LAYERS, batch, WIDTH - 1, c) for c in channels]


def by_kernel(streams, kernels, biases, tails, layer):
    activations = [activation for *_, activation in STREAMS]
    sizes = [None if heads is None else channels // heads for channels, heads, *_ in STREAMS]
    with interpreted_tpu():
        return step_by_kernel(streams, kernels, biases, tails, layer, activations=activations, sizes=sizes)


def by_definition(streams, kernels, biases, tails, layer):
    results = [
        short_convolution(x, w, bias=b, activation=activation, heads=heads, cache=t[layer], implementation="xla")
        for x, w, b, t, (_, heads, _, activation) in zip(streams, kernels, biases, tails, STREAMS, strict=True)
    ]
    return [y for y, _ in results], [t.at[layer].set(new) for t, (_, new) in zip(tails, results, strict=True)]


# One sequence, fewer than a register has, as many, and more that do not fill the last.
@pytest.mark.parametrize(
    ("batch", "time"),
    [(1, 2), (8, 1), *(pytest.param(*of, marks=pytest.mark.slow) for of in ((1, 1), (3, 5), (12, 3)))],
)
def test_the_outputs_and_the_tails(batch, time):
    given = *problem(batch, time=time), jnp.int32(1)
    (ys, tails), (want, new) = by_kernel(*given), by_definition(*given)
    for y, right in zip(ys, want, strict=True):
        assert relative_error(y, right) < 2e-7
    jax.tree.map(np.testing.assert_array_equal, tails, new)


def test_bfloat16():
    """Rounded once, where the definition rounds after every step."""
    given = *problem(8, jnp.bfloat16, time=2), jnp.int32(2)
    wide = jax.tree.map(lambda x: x if x.ndim == 0 else x.astype(jnp.float32), given)
    (ys, tails), (want, _) = by_kernel(*given), by_definition(*wide)
    for y, right in zip(ys, want, strict=True):
        assert y.dtype == jnp.bfloat16
        assert relative_error(y, right) < 3e-3
    jax.tree.map(np.testing.assert_array_equal, tails, by_definition(*given)[1])


@pytest.mark.slow
def test_entries_of_any_size():
    streams, kernels, biases, tails = problem(8)
    biases = [None if b is None else b * 1e30 for b in biases]
    given = [x * 1e30 for x in streams], kernels, biases, [t * 1e30 for t in tails], jnp.int32(0)
    for y, right in zip(by_kernel(*given)[0], by_definition(*given)[0], strict=True):
        assert relative_error(y, right) < 1e-6


def test_what_is_not_finite_stays_in_its_channel_or_head():
    streams, kernels, biases, tails = problem(8)
    streams[0] = streams[0].at[2, 0, 70].set(jnp.inf)  # in the second of two heads
    streams[2] = streams[2].at[3, 0, 5].set(-jnp.inf)
    tails[2] = tails[2].at[1, 4, 0, 7].set(jnp.nan)
    given = streams, kernels, biases, tails, jnp.int32(1)
    (ys, new), (want, right) = by_kernel(*given), by_definition(*given)
    assert [int(jnp.isnan(y).sum()) for y in ys] == [64, 0, 2]
    for y, expected in zip(ys, want, strict=True):
        np.testing.assert_array_equal(jnp.isnan(y), jnp.isnan(expected))
        assert relative_error(jnp.nan_to_num(y), jnp.nan_to_num(expected)) < 2e-7
    jax.tree.map(np.testing.assert_array_equal, new, right)


@pytest.mark.slow
def test_a_map_has_a_layer_for_each():
    given = jax.tree.map(lambda *x: jnp.stack(x), problem(2), problem(2, seed=1))
    layers = jnp.asarray([2, 0], jnp.int32)
    ys, tails = jax.vmap(by_kernel)(*given, layers)
    for n, layer in enumerate(layers.tolist()):
        want, new = by_definition(*jax.tree.map(lambda x, n=n: x[n], given), layer)
        for y, right in zip(ys, want, strict=True):
            assert relative_error(y[n], right) < 2e-7
        jax.tree.map(lambda x, y, n=n: np.testing.assert_array_equal(x[n], y), tails, new)
