"""Triton kernels: interpreted inside jit against float64, and compiled for GPUs that are not here."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

pytest.importorskip("triton", reason="triton is not installed")

from triton.backends.compiler import GPUTarget

from delta_jax import delta_rule
from delta_jax.ops import implementations
from delta_jax.testing import interpreted_triton, relative_error
from pallas_kernels.triton import launch
from pallas_kernels.triton.states import _pass, plan, states_before, unsupported


def problem(key, value, diagonal=0, chunks=2):
    """M, or of a diagonal one as many channels, N, and the first state; two sequences, two heads."""
    rng = np.random.default_rng(0)
    if diagonal:
        transitions = rng.uniform(0.5, 1.0, (chunks, 2, 2, diagonal, 1))
    else:
        transitions = rng.standard_normal((chunks, 2, 2, key, key)) / key**0.5
    given = transitions, rng.standard_normal((chunks, 2, 2, key, value)), rng.standard_normal((2, 2, key, value))
    return tuple(x.astype(np.float32) for x in given)


def by_definition(transitions, left, state, backwards):
    transitions, left, state = (x.astype(np.float64) for x in (transitions, left, state))
    if transitions.shape[-1] == 1:
        transitions = transitions * np.eye(left.shape[3])
    before = [None] * len(left)
    for n in reversed(range(len(left))) if backwards else range(len(left)):
        before[n] = state
        state = (transitions[n].swapaxes(-1, -2) if backwards else transitions[n]) @ state + left[n]
    return np.stack(before), state


def run(transitions, left, state, to=np.float32, backwards=False):
    return states_before((transitions, left), state, to, backwards=backwards)


@pytest.mark.parametrize(("to", "limit"), [(np.float32, 5e-7), (np.float16, 2e-3)])
@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize(
    ("key", "value", "diagonal"),
    [(64, 32, 0), (72, 40, 0), (200, 7, 0), (5, 3, 0), (5, 40, 5), (72, 8, 1)],  # one tile or more, whole or in part
)
def test_interpreted_inside_jit_it_is_the_definition(key, value, diagonal, backwards, to, limit):
    given = problem(key, value, diagonal)
    found = jax.jit(run, static_argnums=(3, 4))(*given, to, backwards)
    for one, exact in zip(found, by_definition(*given, backwards), strict=True):
        assert relative_error(one, exact) < limit
        if to == np.float16 and not diagonal:
            assert relative_error(one, exact) > 5e-5, "it is to multiply as coarsely as a GPU does"


def test_mapped_it_is_a_longer_batch():
    given = problem(16, 16)
    mapped = jax.jit(jax.vmap(run))(*(jnp.stack([x, 2 * x]) for x in given))
    for n, scale in enumerate((1, 2)):
        for one, two in zip(jax.jit(run)(*(scale * x for x in given)), mapped, strict=True):
            assert bool((two[n] == one).all())


SHARED = {
    80: 163,
    86: 99,
    90: 227,
    100: 227,
    120: 99,
    "gfx90a": 64,
    "gfx942": 64,
    "gfx950": 160,
}  # KB a program may have


QUICK = ((80, 128, False), ("gfx942", 128, False))


@pytest.mark.parametrize(
    ("arch", "key", "exact"),
    [
        pytest.param(*case, marks=[] if case in QUICK else [pytest.mark.slow])
        for case in itertools.product(SHARED, (128, 256), (False, True))
    ],
)
def test_it_is_compiled_for_a_gpu_that_is_not_here(arch, key, exact):
    nvidia = isinstance(arch, int)
    target = GPUTarget("cuda", arch, 32) if nvidia else GPUTarget("hip", arch, 64)
    tile, block, precision, stages = plan(target, key, 128, exact=exact)
    constants = {"chunks": 128, "key": key, "value": 128, "tile": tile, "block": block, "diagonal": False}
    constants |= {"backwards": True, "precision": precision}
    made = launch.compiled(_pass, target, ("*fp32",) * 5, 4, stages, constants)
    assert made.metadata.shared <= SHARED[arch] * 1024, "the launcher refuses what the compiler takes"
    if nvidia:
        assert made.asm["cubin"] and ".version 8.8" in made.asm["ptx"]
    else:
        assert made.asm["hsaco"] and "v_mfma_f32" in made.asm["amdgcn"]
        assert ".vgpr_spill_count: 0" in made.asm["amdgcn"]


def test_what_it_does_not_take_is_named(monkeypatch):
    with interpreted_triton():
        assert implementations()["triton"] is None
        wide = jnp.ones((1, 4, 1, 257))
        with pytest.raises(ValueError) as caught:
            delta_rule(wide, wide, wide[..., :3], implementation="triton")
        assert "'triton' cannot run here: the Triton kernel takes key sizes up to 256, not 257." in str(caught.value)
        with jax.enable_x64(True):
            assert "not float64" in unsupported(*[jnp.ones((1, 4, 1, 8))] * 2)
        (batch,) = jax.export.symbolic_shape("b")
        assert "not b, 4, 1, 8" in unsupported(*[jax.ShapeDtypeStruct((batch, 4, 1, 8), jnp.float32)] * 2)
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        assert implementations()["triton"] == "Triton is not installed: it is the extra `triton` of this package"


def test_a_device_that_is_described_but_unknown_is_named():
    device = AbstractDevice(device_kind="GTX 480", num_cores=15, platform="gpu")
    with pytest.raises(ValueError) as caught:
        launch.target_of(device)
    assert "MI series" in str(caught.value)
    assert "not GTX 480" in str(caught.value)
    mesh = AbstractMesh((1,), ("x",), (AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        assert "not GTX 480" in launch.unavailable()
