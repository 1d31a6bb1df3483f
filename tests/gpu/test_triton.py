"""Triton kernels: interpreted inside jit against the recurrence, and compiled for GPUs that are not here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice

pytest.importorskip("triton", reason="triton is not installed")

from triton.backends.compiler import GPUTarget

from pallas_kernels.batching import joins_batch
from pallas_kernels.triton import launch
from pallas_kernels.triton.scan import BLOCK, CHUNK, Prepared, _scan, scan

SCALE = 0.3


def problem(batch, time, key_heads, heads, key, value):
    """Queries, keys, values, beta, gates and first states, in float64, what the kernels round rounded."""
    rng = np.random.default_rng(0)

    def rounded(x):
        return np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64)

    def unit(*shape):
        x = rng.standard_normal(shape)
        return rounded(x / np.linalg.norm(x, axis=-1, keepdims=True))

    q, k = unit(batch, time, key_heads, key), unit(batch, time, key_heads, key)
    v, beta = rounded(rng.standard_normal((batch, time, heads, value))), rng.uniform(0.0, 1.0, (batch, time, heads))
    return q, k, v, beta, -rng.uniform(0.0, 0.2, (batch, time, heads)), rng.standard_normal((batch, heads, key, value))


def of_heads(q, k, v):
    return (np.repeat(x, v.shape[2] // x.shape[2], 2) for x in (q, k))


def recurrence(q, k, v, beta, g, state):
    q, k = of_heads(q, k, v)
    o = np.zeros(v.shape)
    for t in range(v.shape[1]):
        state = state * np.exp(g[:, t])[..., None, None]
        unknown = v[:, t] - np.einsum("bhk,bhkv->bhv", k[:, t], state)
        state = state + np.einsum("bh,bhk,bhv->bhkv", beta[:, t], k[:, t], unknown)
        o[:, t] = SCALE * np.einsum("bhk,bhkv->bhv", q[:, t], state)
    return o, state


def prepared(q, k, v, beta, g):
    """What the pass takes of every chunk, by its definition."""
    q, k = of_heads(q, k, v)

    def chunks(x):
        return np.moveaxis(x.reshape(x.shape[0], -1, CHUNK, *x.shape[2:]), 3, 1)

    q, k, beta, g = chunks(q), chunks(k), chunks(beta), chunks(g)
    sums = np.cumsum(g, -1)
    decay = np.exp(np.tril(sums[..., :, None] - sums[..., None, :])) * np.tril(np.ones((CHUNK, CHUNK)))
    a = np.tril(k @ k.swapaxes(-1, -2) * decay * beta[..., None, :], -1)
    x = jnp.asarray(np.linalg.inv(np.eye(CHUNK) + a), jnp.float32)
    high = x.astype(jnp.bfloat16)
    low = (x - high.astype(jnp.float32)).astype(jnp.bfloat16)
    scalars = np.stack([beta, g / np.log(2.0), np.exp(sums), np.exp(sums[..., -1:] - sums)], 3)
    p = jnp.asarray(SCALE * (q @ k.swapaxes(-1, -2)) * decay, jnp.bfloat16)
    return Prepared(p, jnp.stack([high, low], 3), jnp.asarray(scalars, jnp.float32))


def arguments(q, k, v, beta, g, state):
    given = (jnp.asarray(x, jnp.bfloat16) for x in (q, k, v))
    return *given, prepared(q, k, v, beta, g), jnp.asarray(state, jnp.float32)


@joins_batch
def run(q, k, v, done, state):
    return scan(q, k, v, done, state, scale=SCALE)


def test_interpreted_inside_jit_it_is_the_recurrence():
    given = problem(2, 2 * CHUNK, 1, 2, 32, 2 * BLOCK)
    for found, exact in zip(jax.jit(run)(*arguments(*given)), recurrence(*given), strict=True):
        error = np.linalg.norm(np.asarray(found, np.float64) - exact) / np.linalg.norm(exact)
        assert error < 8e-3, "bfloat16 has 4e-3, and P, Y and the states are rounded"


def test_mapped_it_is_a_longer_batch():
    given = arguments(*problem(2, CHUNK, 2, 2, 16, 16))
    mapped = jax.jit(jax.vmap(run))(*jax.tree.map(lambda x: jnp.stack([x, x[::-1]]), given))
    for one, two in zip(jax.jit(run)(*given), mapped, strict=True):
        assert bool((two[0] == one).all() and (two[1] == one[::-1]).all())


@pytest.mark.parametrize("arch", [80, 90, 120, "gfx90a", "gfx942"])
def test_it_is_compiled_for_a_gpu_that_is_not_here(arch):
    nvidia = isinstance(arch, int)
    target = GPUTarget("cuda", arch, 32) if nvidia else GPUTarget("hip", arch, 64)
    types = ("*bf16",) * 5 + ("*fp32",) * 2 + ("*bf16", "*fp32")
    sizes = {"chunks": 128, "heads": 32, "key_heads": 16, "key": 128, "value": 128, "block": BLOCK}
    made = launch.compiled(_scan, target, types, 4, 2, {**sizes, "chunk": CHUNK, "scale": SCALE})
    shared = {80: 163, 90: 227, 120: 99, "gfx90a": 64, "gfx942": 64}
    assert made.metadata.shared <= shared[arch] * 1024, "the launcher refuses what the compiler takes"
    if nvidia:
        assert made.asm["cubin"] and ".version 8.8" in made.asm["ptx"]
    else:
        assert made.asm["hsaco"] and "v_mfma" in made.asm["amdgcn"]
        assert ".vgpr_spill_count: 0" in made.asm["amdgcn"]


def test_a_device_that_is_described_but_unknown_is_named():
    device = AbstractDevice(device_kind="GTX 480", num_cores=15, platform="gpu")
    with pytest.raises(ValueError) as caught:
        launch.target_of(device)
    assert "MI300" in str(caught.value)
    assert "not GTX 480" in str(caught.value)
