"""The kernel of convolution, bias, SiLU and heads of length one, interpreted, against the definition."""

from functools import partial
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from delta_jax.layers import MIXERS, l2_normalize
from delta_jax.ops import device, prologue
from delta_jax.ops.short_convolution import short_convolution
from delta_jax.parallel import MeshConfig, make_mesh
from delta_jax.testing.trials import interpreted_tpu
from pallas_kernels.tpu import convolution


@pytest.fixture(autouse=True)
def _one_group_at_a_time():
    """A shorter program to interpret."""
    jax.clear_caches()
    with mock.patch.object(convolution, "_FORWARD", 1), mock.patch.object(convolution, "_BACKWARD", 1):
        yield
    jax.clear_caches()


def problem(time, channels, width, *, bias=False, packed=False, padded=False, dtype=jnp.float32, batch=2):
    keys = jax.random.split(jax.random.key(time), 5)
    arrays = {
        "x": jax.random.normal(keys[0], (batch, time, channels), dtype),
        "kernel": jax.random.normal(keys[1], (width, channels)),
        "cache": jax.random.normal(keys[2], (batch, width - 1, channels), dtype),
    }
    if bias:
        arrays["bias"] = jax.random.normal(keys[3], (channels,))
    given = {}
    if packed:
        starts = jax.random.uniform(keys[4], (batch, time)) < 0.2
        given["segment_ids"] = jnp.cumsum(starts, axis=1, dtype=jnp.int32)
    if padded:
        given["lengths"] = jnp.asarray([time - 5, 0][:batch], jnp.int32)
    return arrays, given


def results(implementation, arrays, given, heads, activation="silu", loss_over=None):
    """Outputs, the new cache, and the gradients of a loss over both."""

    def loss(arrays):
        y, new = short_convolution(**arrays, **given, heads=heads, activation=activation, implementation=implementation)
        wide = y.astype(jnp.float32)
        weights = jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
        where = jnp.ones(y.shape, bool) if loss_over is None else loss_over
        return jnp.sum(wide * weights, where=where) + jnp.sum(jnp.sin(new[:, 1:].astype(jnp.float32))), (y, new)

    return jax.jit(jax.grad(loss, has_aux=True))(arrays)


def interpreted(*arguments, **options):
    with interpreted_tpu():
        return results("pallas", *arguments, **options)


def assert_alike(got, want, tolerance=2e-5):
    def compare(a, b):
        assert a.dtype == b.dtype
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_array_equal(np.isnan(a), np.isnan(b))
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * max(1.0, np.nanmax(np.abs(b), initial=0.0)))

    jax.tree.map(compare, got, want)


def test_segments_cache_lengths_and_all_gradients():
    arrays, given = problem(37, 128, 4, bias=True, packed=True, padded=True)
    got = interpreted(arrays, given, 1)
    assert np.abs(got[0]["cache"][0]).max() > 1e-3
    assert_alike(got, results("xla", arrays, given, 1))


# time, channels, heads, width: more than a block of time, halves of registers, registers that two heads share, one that is
# not filled.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("time", "channels", "heads", "width", "options"),
    [
        (700, 128, 2, 4, {"packed": True}),
        (40, 256, 1, 3, {"padded": True}),
        (33, 576, 3, 2, {"packed": True, "bias": True}),
        (16, 128, 1, 1, {"bias": True, "padded": True}),
        (100, 192, None, 4, {"packed": True, "padded": True}),
        (600, 128, None, 4, {}),
        (50, 512, 1, 8, {"packed": True}),
    ],
)
def test_widths_sizes_and_lengths(time, channels, heads, width, options):
    arrays, given = problem(time, channels, width, **options)
    assert_alike(interpreted(arrays, given, heads), results("xla", arrays, given, heads))


@pytest.mark.slow
@pytest.mark.parametrize("heads", [1, None])
def test_without_an_activation(heads):
    arrays, given = problem(20, 128, 4, batch=1)
    assert_alike(interpreted(arrays, given, heads, "identity"), results("xla", arrays, given, heads, "identity"))


@pytest.mark.slow
def test_bfloat16_is_rounded_once():
    arrays, given = problem(40, 128, 4, dtype=jnp.bfloat16, packed=True)
    wide = arrays | {name: arrays[name].astype(jnp.float32) for name in ("x", "cache")}
    (gradient, (y, cache)), (exact, (wanted, kept)) = interpreted(arrays, given, 1), results("xla", wide, given, 1)
    assert y.dtype == gradient["x"].dtype == cache.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(y, np.float32), wanted, rtol=2**-8, atol=1e-6)
    np.testing.assert_array_equal(np.asarray(cache, np.float32), kept)
    for name in ("x", "cache"):
        assert_alike(gradient[name].astype(jnp.float32), exact[name], 2**-8)
    assert_alike(gradient["kernel"], exact["kernel"], 2**-7)


@pytest.mark.slow
@pytest.mark.parametrize("heads", [2, None])
@pytest.mark.parametrize("poison", [np.nan, np.inf, 1e30])
def test_what_is_not_seen_reaches_no_output_or_gradient(heads, poison):
    """One channel of a token, all of another, and the whole cache are poisoned; the loss is over what sees none of it."""
    arrays, given = problem(40, 128, 4, bias=True, packed=True)
    bad = np.zeros((2, 40, 128), bool)
    bad[0, 12, 3] = bad[1, 25] = True
    poisoned = arrays | {
        "x": jnp.where(bad, poison, arrays["x"]),
        "cache": jnp.full_like(arrays["cache"], poison),
    }
    runs, clean = np.asarray(given["segment_ids"]) - np.asarray(given["segment_ids"])[:, :1], np.ones(bad.shape, bool)
    clean[:, :3] &= (runs[:, :3] > 0)[..., None]
    for row, time, channel in np.argwhere(bad):
        late = slice(time, time + 4)
        whole = slice(None) if heads is None else slice(channel // 64 * 64, channel // 64 * 64 + 64)
        seen = runs[row, late] == runs[row, time]
        clean[row, late, channel if heads is None else whole] &= ~seen if heads is None else ~seen[:, None]
    assert clean[0, 12, 64:].all()
    assert not clean[0, 12, 3]
    got, (y, _) = interpreted(poisoned, given, heads, loss_over=jnp.asarray(clean))
    want, (wanted, _) = interpreted(arrays, given, heads, loss_over=jnp.asarray(clean))
    np.testing.assert_allclose(np.asarray(y)[clean], np.asarray(wanted)[clean], rtol=1e-6, atol=1e-6)
    assert np.isfinite(poison) or np.isnan(np.asarray(y)[~clean]).all()
    got["x"], want["x"] = (jnp.where(bad, 0.0, g["x"]) for g in (got, want))
    assert_alike(got, want)
    definition, (of_it, _) = results("xla", poisoned, given, heads, loss_over=jnp.asarray(clean))
    np.testing.assert_array_equal(np.isnan(y), np.isnan(of_it))
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(definition))


@pytest.mark.parametrize("eps", [1e-6, 1e-60])
def test_the_length_of_heads_of_any_size(eps):
    sizes = jnp.asarray([1e-30, 1.0, 1e18, 1e30] * 4)[None, :, None, None]
    x = sizes * jax.random.normal(jax.random.key(0), (1, 16, 1, 128))
    weights = jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)

    @partial(jax.jit, static_argnums=0)
    def run(implementation, x):
        y, pull = jax.vjp(lambda x: l2_normalize(x, eps, implementation=implementation), x)
        return y, pull(weights)[0]

    with interpreted_tpu():
        y, d = run("pallas", x)
    wanted, expected = run("xla", x)
    np.testing.assert_allclose(y, wanted, rtol=2e-6, atol=1e-7)
    largest = np.abs(expected).max((0, 2, 3), keepdims=True)
    assert (np.abs(d - expected) <= 2e-5 * largest + 2e-38).all()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"x": jnp.zeros((2, 8, 128))}, "take 16 tokens or more, not 8"),
        ({"x": jnp.zeros((2, 20, 128), jnp.float16)}, "take bfloat16 and float32, not float16"),
        ({"x": jnp.zeros((2, 20, 100)), "kernel": jnp.zeros((4, 100))}, "half registers of 128 lanes, not 100"),
        ({"heads": 4}, "take heads of 64, 128, ... 512 channels, not 32"),
        ({"kernel": jnp.zeros((9, 128))}, "convolutions of at most 8 tokens, not 9"),
        ({"activation": "relu"}, "activations silu and identity, not relu"),
    ],
)
def test_what_the_kernel_does_not_take(change, sentence):
    arguments = {"x": jnp.zeros((2, 20, 128)), "kernel": jnp.zeros((4, 128))} | change
    with interpreted_tpu(), pytest.raises(ValueError, match=sentence):
        short_convolution(**arguments, implementation="pallas")
    with interpreted_tpu():
        short_convolution(**arguments)  # the definition in its place


def test_kernels_are_for_tpus_and_names_are_known():
    x, kernel = jnp.zeros((2, 20, 128)), jnp.zeros((4, 128))
    for name, sentence in {
        "pallas": "run on TPUs, and this is a cpu",
        "triton": "must be None, 'xla' or one of",
    }.items():
        with pytest.raises(ValueError, match=sentence):
            short_convolution(x, kernel, implementation=name)
    for change, sentence in [
        ({"heads": 3}, "heads must divide the 128 channels of x, got 3"),
        ({"activation": "tanh"}, "activation must be one of silu"),
        ({"bias": jnp.zeros(4)}, r"bias must have shape \[channels=128\]"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            short_convolution(x, kernel, **change)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gated_delta_net", "delta_product"])
def test_layers(name):
    """Packed rows that continue a cache, with padding: the same outputs, cache and gradients as on a CPU."""

    layer = MIXERS[name](32, num_heads=2, head_dim=64, expand_v=1.0, chunk_size=16, rngs=nnx.Rngs(0))
    keys = jax.random.split(jax.random.key(1), 2)
    x, before = (jax.random.normal(key, (2, time, 32)) for key, time in zip(keys, (24, 6), strict=True))
    ids = jnp.asarray(np.arange(24) // 7)[None].repeat(2, 0)
    mask = jnp.asarray(np.arange(24)[None] < [[24], [17]])
    _, cache = layer(before, segment_ids=jnp.zeros((2, 6), jnp.int32), return_cache=True)
    graph, state = nnx.split(layer)
    asked = []

    def choose(*arguments, **options):
        asked.append(kept(*arguments, **options))
        return asked[-1]

    kept = prologue.takes_kernel

    def run(x):
        def loss(state, x):
            y, new = nnx.merge(graph, state)(x, segment_ids=ids, mask=mask, cache=cache)
            return jnp.sum(jnp.sin(y)) + sum(jnp.sum(jnp.sin(a)) for a in new.convolution), (y, new)

        return jax.grad(loss, (0, 1), has_aux=True)(state, x)

    want = run(x)
    # The op itself stays XLA's: its kernels are tried elsewhere.
    with (
        interpreted_tpu(),
        mock.patch("delta_jax.layers.rule.choose", side_effect=lambda *a, **k: _xla()),
        mock.patch("delta_jax.ops.api.choose", side_effect=lambda *a, **k: _xla()),
        mock.patch("delta_jax.ops.short_convolution.takes_kernel", choose),
    ):
        got = run(x)
    assert asked
    assert all(asked)
    assert_alike(got, want, 1e-4)


def _xla():
    from delta_jax.ops.implementations import IMPLEMENTATIONS

    return next(one for one in IMPLEMENTATIONS if one.name == "xla")


def test_on_a_mesh_every_device_has_its_own_sequences_and_heads():
    """Read off the program, since it cannot run here: what does not divide is left to the compiler."""
    layer = MIXERS["gated_delta_net"](32, num_heads=2, head_dim=64, expand_v=1.0, rngs=nnx.Rngs(0))
    graph, state = nnx.split(layer)

    def program(batch):
        def convolve(state, x):
            one = nnx.merge(graph, state).q_conv
            return l2_normalize(one(x, None, None, heads=2)[0].reshape(*x.shape[:2], 2, -1))

        return str(jax.make_jaxpr(convolve)(state, jnp.zeros((batch, 16, 128))))

    with mock.patch.object(device, "platform", return_value="tpu"):
        assert program(4).count("pallas_call") == 2
        with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
            even, uneven = program(4), program(3)
    assert even.count("shard_map") == even.count("pallas_call") == 2
    assert "f32[1,16,64]" in even
    assert "pallas_call" not in uneven
