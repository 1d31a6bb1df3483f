"""Attention block by block, and the places of packed tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from delta_jax.ops.attention import Places, attend, places

TIME, PAST = 19, 6
IDS = jnp.array([[4] * 8 + [2] * 11, [1] * 3 + [0] * 4 + [1] * 12])


def test_places_count_within_runs_of_equal_ids():
    run, position = places(IDS, jnp.array([5, 7]))
    np.testing.assert_array_equal(run, [[0] * 8 + [1] * 11, [0] * 3 + [1] * 4 + [2] * 12])
    np.testing.assert_array_equal(position[0], [*range(5, 13), *range(11)])
    np.testing.assert_array_equal(position[1], [*range(7, 10), *range(4), *range(12)])


@functools.partial(jax.jit, static_argnames=("window", "block"))
def value_and_gradients(q, k, v, placed, window, block):
    def loss(q, k, v):
        o = attend(q, k, v, scale=0.4, window=window, places=placed, block=block)
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
        placed = (places(IDS), places(IDS))
    elif past:
        here = places(IDS, jnp.full((2,), past, jnp.int32))
        before = jnp.broadcast_to(jnp.arange(past, dtype=jnp.int32)[None], (2, past))
        joined = (jnp.concatenate(pair, axis=1) for pair in zip((jnp.zeros_like(before), before), here, strict=True))
        placed = (here, Places(*joined))
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
