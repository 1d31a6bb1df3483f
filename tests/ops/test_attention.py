"""Attention block by block, and the positions of packed tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from delta_jax.ops import attention
from delta_jax.ops.attention import attend, visible
from delta_jax.ops.segments import Positions, positions

TIME, PAST = 19, 6
IDS = jnp.array([[4] * 8 + [2] * 11, [1] * 3 + [0] * 4 + [1] * 12])


def test_positions_count_within_segments():
    segment, position = positions(IDS, jnp.array([5, 7]))
    np.testing.assert_array_equal(segment, [[0] * 8 + [1] * 11, [0] * 3 + [1] * 4 + [2] * 12])
    np.testing.assert_array_equal(position[0], [*range(5, 13), *range(11)])
    np.testing.assert_array_equal(position[1], [*range(7, 10), *range(4), *range(12)])


@functools.partial(jax.jit, static_argnames=("window", "block"))
def value_and_gradients(q, k, v, placed, window, block):
    def loss(q, k, v):
        o = attend(q, k, v, scale=0.4, window=window, positions=placed, block=block)
        return jnp.sum(o * jnp.cos(jnp.arange(o.size, dtype=jnp.float32)).reshape(o.shape)), o

    return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("kind", ["one segment", "packed", "with a past"])
def test_blocks_change_nothing(kind, window):
    past = PAST if kind == "with a past" else 0
    q, k, v = (
        jax.random.normal(jax.random.key(seed), (2, length, heads, size))
        for seed, (length, heads, size) in enumerate([(TIME, 4, 6), (past + TIME, 2, 6), (past + TIME, 2, 4)])
    )
    placed = None
    if kind == "packed":
        placed = (positions(IDS), positions(IDS))
    elif past:
        here = positions(IDS, jnp.full((2,), past, jnp.int32))
        before = jnp.broadcast_to(jnp.arange(past, dtype=jnp.int32)[None], (2, past))
        joined = (jnp.concatenate(pair, axis=1) for pair in zip((jnp.zeros_like(before), before), here, strict=True))
        placed = (here, Positions(*joined))
    whole = value_and_gradients(q, k, v, placed, window, TIME)
    parts = value_and_gradients(q, k, v, placed, window, 4)
    for one, other in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(one, other, atol=3e-6, rtol=1e-5)


def test_memory_and_work_of_a_window_grow_with_time():
    def products(time, window):
        q = jax.ShapeDtypeStruct((1, time, 1, 8), jnp.float32)
        function = jax.jit(functools.partial(attend, scale=1.0, window=window, block=64))
        cost = function.lower(q, q, q).compile()
        return cost.cost_analysis()["flops"], cost.memory_analysis().temp_size_in_bytes

    (flops, memory), (more_flops, more_memory) = products(256, 32), products(1024, 32)
    assert more_flops < 4.5 * flops
    assert more_memory < 6 * memory
    assert products(1024, None)[0] < 0.6 * 2 * 2 * 1024**2 * 8 + 12 * 1024**2


def oracle(q, k, v, seen):
    """A softmax over what a query sees, row by row in float64; NaN where anything of it is not finite."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    o, groups = np.zeros((*q.shape[:3], v.shape[-1])), q.shape[2] // k.shape[2]
    for b, t, h in np.ndindex(q.shape[:3]):
        keys = np.flatnonzero(seen[b, 0, t])
        if not all(np.isfinite(x).all() for x in (q[b, t, h], k[b, keys, h // groups], v[b, keys, h // groups])):
            o[b, t, h] = np.nan
        elif len(keys):
            scores = 0.4 * (k[b, keys, h // groups] @ q[b, t, h])
            weights = np.exp(scores - scores.max())
            o[b, t, h] = weights @ v[b, keys, h // groups] / weights.sum()
    return o


POISON = {"nan": np.nan, "infinity": np.inf, "minus infinity": -np.inf, "overflow": 1e30, "largest": 3e38}


@functools.partial(jax.jit, static_argnames=("window", "block"))
def of_clean(q, k, v, placed, clean, window, block):
    """The output, and the gradients of a loss over clean tokens alone."""

    def loss(q, k, v):
        o = attend(q, k, v, scale=0.4, window=window, positions=placed, block=block)
        weights = jnp.cos(jnp.arange(o.size, dtype=jnp.float32)).reshape(o.shape)
        return jnp.sum(o * weights, where=clean[..., None, None]), o

    return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)


def drawn(heads=4):
    sizes = ((TIME, heads, 6), (TIME, 2, 6), (TIME, 2, 4))
    return [jax.random.normal(jax.random.key(seed), (2, *size)) for seed, size in enumerate(sizes)]


@pytest.mark.parametrize("poison", POISON)
@pytest.mark.parametrize(("window", "block"), [(None, TIME), (5, 4)])
def test_what_a_query_does_not_see_cannot_reach_it(poison, window, block):
    """Token 5 of one segment is poisoned, and all of the second row's middle one; the last tokens are in neither."""
    placed = (positions(IDS), positions(IDS))
    seen = np.asarray(visible(*placed, window))
    bad = np.zeros((2, TIME), bool)
    bad[0, 5], bad[1, 3:7] = True, True
    arrays = drawn()
    poisoned = [jnp.where(bad[..., None, None], POISON[poison] * jnp.sign(x), x) for x in arrays]
    clean = ~(seen & bad[:, None, None]).any(axis=-1)[:, 0]
    assert clean[0, :5].all()  # earlier
    assert clean[1, 7:].all()  # another segment
    (_, o), gradients = of_clean(*poisoned, placed, clean, window, block)
    (_, wanted_o), wanted = of_clean(*arrays, placed, clean, window, block)
    exact = oracle(*poisoned, seen)
    if np.isfinite(exact).all():  # products that float32 does not hold: NaN, never another number
        exact = np.where(np.isnan(o), np.nan, exact)
    np.testing.assert_allclose(o, exact, atol=2e-6, rtol=2e-6)
    np.testing.assert_array_equal(np.asarray(o)[clean], np.asarray(wanted_o)[clean])
    for one, other in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_poison_in_queries_keys_or_values_alone(which):
    placed, arrays = (positions(IDS), positions(IDS)), drawn()
    arrays[which] = arrays[which].at[:, 9, 0, 1].set(jnp.nan)
    seen = np.asarray(visible(*placed, None))
    (_, o), gradients = of_clean(*arrays, placed, jnp.arange(TIME)[None] < jnp.full((2, 1), 9), None, TIME)
    wanted = oracle(*arrays, seen)
    assert np.isnan(wanted).any()
    np.testing.assert_allclose(o, wanted, atol=2e-6)
    assert all(np.isfinite(d).all() for d in gradients)


def test_a_query_that_sees_nothing_gives_zeros():
    q, k, v = drawn()
    here = positions(IDS)
    nowhere = Positions(jnp.full_like(here.segment, -1), here.position)
    (_, o), gradients = of_clean(q, k, v, (here, nowhere), jnp.ones((2, TIME), bool), None, TIME)
    assert not np.any(o)
    assert not any(np.any(d) for d in gradients)


def test_the_library_gets_and_gives_nothing_that_is_masked(monkeypatch):
    """cuDNN needs a GPU; what goes into it and what is made of its result does not."""
    given, library = [], jax.nn.dot_product_attention

    def recorded(*arrays, implementation, **options):
        assert implementation == "cudnn"
        given.extend(arrays)
        return library(*arrays, implementation="xla", **options)

    monkeypatch.setattr(attention.jax.nn, "dot_product_attention", recorded)
    monkeypatch.setattr(attention.device, "platform", lambda: "gpu")
    bad = jnp.arange(TIME)[None, :, None, None] == 7
    arrays = [jnp.where(bad, jnp.nan, x).astype(jnp.float16) for x in drawn()]
    for placed, window in ((None, None), (None, 5), ((positions(IDS), positions(IDS)), None)):
        call = functools.partial(attend, scale=0.4, window=window, positions=placed, implementation="cudnn")
        index = jnp.broadcast_to(jnp.arange(TIME)[None], IDS.shape)
        at = placed or (Positions(jnp.zeros_like(index), index),) * 2
        wide = [x.astype(jnp.float32) for x in arrays]
        np.testing.assert_allclose(call(*arrays), oracle(*wide, np.asarray(visible(*at, window))), atol=4e-3)
    assert all(np.isfinite(x).all() for x in given)


def test_an_implementation_that_cannot_run_says_why(monkeypatch):
    q, k, v = drawn()
    with pytest.raises(ValueError, match='must be None, "xla" or "cudnn", got \'fast\''):
        attend(q, k, v, scale=0.4, implementation="fast")
    with pytest.raises(ValueError, match="'cudnn' cannot run here: it runs on NVIDIA GPUs, and this is a cpu"):
        attend(q, k, v, scale=0.4, implementation="cudnn")
    monkeypatch.setattr(attention.device, "platform", lambda: "gpu")
    with pytest.raises(ValueError, match="it takes bfloat16 and float16, not float32"):
        attend(q, k, v, scale=0.4, implementation="cudnn")
