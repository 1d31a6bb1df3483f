"""What the contract suite leaves open of the GPU kernels, which take bfloat16: interpreted on the CPU."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from delta_jax import delta_rule
from delta_jax.ops import implementations
from delta_jax.ops.arguments import Arguments
from delta_jax.ops.implementations import choose
from delta_jax.testing import (
    MEMBERS,
    TRIALS,
    beyond_rounding,
    evaluate,
    interpreted_gpu,
    op_of,
    problem,
    reference,
    relative_error,
    step_of,
)
from pallas_kernels import devices
from pallas_kernels.gpu import machine, plan

SIZES = TRIALS["mosaic_gpu"].sizes
each_member = pytest.mark.parametrize("member", MEMBERS)
# The interpreter's programs take long to compile: tests that need no gradient, or that vary shapes, take some members.
some_members = pytest.mark.parametrize("member", ["gated_delta_net", "gated_delta_net_2"])


@pytest.fixture(autouse=True)
def _interpreted():
    assert jax.device_count() >= 4, "the interpreter would wait for threads that there are not: see tests/conftest.py"
    jax.clear_caches()
    with interpreted_gpu():
        yield
    jax.clear_caches()  # what is interpreted is compiled as it is called


def check(member, inputs, cotangents, hard="plain", **options):
    got = evaluate(member, inputs, jnp.bfloat16, cotangents, implementation="mosaic_gpu", **options)
    assert beyond_rounding(member, hard, inputs, cotangents, got, **options) == []
    return got


def test_several_writes_a_token():
    inputs, cotangents = problem("gated_delta_product", **(SIZES | {"time": 33}))
    check("gated_delta_product", inputs, cotangents)


@some_members
def test_packed_segments_and_runs_repeat(member):
    inputs, cotangents = problem(member, **SIZES)
    segment_ids = np.repeat([3, 9, 3, 4], [17, 1, 40, 42])[None]
    got = check(member, inputs, cotangents, segment_ids=segment_ids)
    again = evaluate(member, inputs, jnp.bfloat16, cotangents, implementation="mosaic_gpu", segment_ids=segment_ids)
    assert all(np.array_equal(got[name], again[name]) for name in got)


@some_members
def test_what_is_not_finite_reaches_no_other_segment(member):
    inputs, cotangents = problem(member, **SIZES)
    segment_ids = np.repeat([3, 9, 3, 4], [17, 1, 40, 42])[None]
    want = evaluate(member, inputs, jnp.bfloat16, cotangents, implementation="mosaic_gpu", segment_ids=segment_ids)
    bad = {name: x.copy() for name, x in inputs.items()}
    for name in inputs.keys() - {"initial_state"}:
        bad[name][:, 20:50:7] = np.nan
    got = evaluate(member, bad, jnp.bfloat16, cotangents, implementation="mosaic_gpu", segment_ids=segment_ids)
    for name, x in want.items():
        for tokens in (slice(0, 18), slice(58, None)) if name not in ("state", "d_initial_state") else (slice(None),):
            assert relative_error(got[name][:, tokens], x[:, tokens]) < 2**-6, name


@pytest.mark.parametrize(
    ("member", "time", "shape"),
    [
        ("gated_delta_net", 70, (1, 1, 1, 128, 128)),
        ("gated_delta_net_2", 70, (1, 1, 1, 128, 128)),
        ("gated_delta_net", 64, (2, 1, 2, 64, 128)),
        ("gated_delta_net_2", 3, (1, 1, 2, 128, 64)),
    ],
)
def test_sizes(member, time, shape):
    inputs, cotangents = problem(member, time=time, shape=shape)
    check(member, inputs, cotangents)


def test_the_largest_sizes():
    inputs, cotangents = problem("gated_delta_net", time=20, shape=(1, 1, 1, 256, 512))
    check("gated_delta_net", inputs, cotangents)


def test_erase_keys_of_their_own_for_every_value_head():
    inputs, cotangents = problem("online_scaled", time=70, shape=(1, 1, 2, 64, 64))
    shape = (*inputs["v"].shape[:3], inputs["k"].shape[3])
    inputs["erase"] = np.random.default_rng(3).standard_normal(shape) / shape[3] ** 0.5
    check("online_scaled", inputs, cotangents)


def test_many_chunks_go_through_the_ring():
    """Five chunks, more than are in shared memory at a time."""
    inputs, cotangents = problem("gated_delta_net", time=320, shape=(1, 1, 1, 64, 64))
    check("gated_delta_net", inputs, cotangents)


@pytest.mark.parametrize(("member", "segments"), [("gated_delta_net", 2), ("negative_eigenvalues", 1)])
def test_pieces_of_a_sequence_join_exactly(member, segments, monkeypatch):
    """Four pieces of one chunk; a segment ends in the second."""
    monkeypatch.setattr(plan, "JOIN", 0.0)
    assert plan.pieces_of(machine.HOPPER, 1, 4, 64, 64, exact=False) == 4
    inputs, cotangents = problem(member, time=250, shape=(1, 1, 1, 64, 64))
    segment_ids = np.repeat([1, segments], [100, 150])[None]
    check(member, inputs, cotangents, segment_ids=segment_ids)


def test_when_a_sequence_is_cut():
    """A few heads and many chunks; the programs of the pass over the pieces fit the multiprocessors."""
    assert plan.pieces_of(machine.HOPPER, 1, 8192 // 64, 128, 128, exact=True) == 4
    assert plan.pieces_of(machine.HOPPER, 1, 131072 // 64, 128, 128, exact=True) == 16
    assert plan.pieces_of(machine.HOPPER, 8, 131072 // 64, 128, 128, exact=True) == 4
    assert plan.pieces_of(machine.HOPPER, 32, 131072 // 64, 128, 128, exact=True) == 1
    assert plan.pieces_of(machine.HOPPER, 1, 1024 // 64, 128, 128, exact=True) == 1


@some_members
def test_splitting_and_carrying_the_state_equals_one_call(member):
    inputs, _ = problem(member, **SIZES)
    arrays = {name: jnp.asarray(x, jnp.bfloat16) for name, x in inputs.items()}
    carried = arrays.pop("initial_state").astype(jnp.float32)
    whole, state = op_of(member)(**arrays, initial_state=carried, implementation="mosaic_gpu")
    parts = []
    for start in (0, 50):  # not at a chunk: what is rounded is another
        piece = {name: x[:, start : start + 50] for name, x in arrays.items()}
        o, carried = op_of(member)(**piece, initial_state=carried, implementation="mosaic_gpu")
        parts.append(o)
    assert relative_error(np.concatenate(parts, 1), whole) < 2**-7
    assert relative_error(carried, state) < 2**-7


@some_members
def test_vmap_joins_the_batch(member):
    inputs, _ = problem(member, time=64, shape=(2, 1, 1, 64, 64))
    arrays = {name: jnp.asarray(x, jnp.bfloat16) for name, x in inputs.items()}
    want = op_of(member)(**arrays, implementation="mosaic_gpu")
    one = jax.tree.map(lambda x: x[:, None], arrays)
    got = jax.vmap(lambda x: op_of(member)(**x, implementation="mosaic_gpu"))(one)
    for x, y in zip(got, want, strict=True):
        assert np.array_equal(np.asarray(x[:, 0]), np.asarray(y))


@each_member
def test_step_by_step_equals_the_whole(member):
    inputs, _ = problem(member, **(SIZES | {"time": 4}))
    arrays = {name: jnp.asarray(x, jnp.bfloat16) for name, x in inputs.items()}
    state = arrays.pop("initial_state").astype(jnp.float32)
    whole, final = op_of(member)(**arrays, initial_state=state, implementation="recurrent")
    step = jax.jit(lambda token, state: step_of(member)(**token, state=state, implementation="mosaic_gpu"))
    for t in range(4):
        o, state = step({f"{name}_t": x[:, t] for name, x in arrays.items()}, state)
        assert relative_error(o, whole[:, t]) < 2**-8
    assert relative_error(state, final) < 1e-6


@pytest.mark.parametrize(
    ("generation", "member", "shape"),
    [
        ("sm_80", "gated_delta_net", (1, 1, 2, 128, 64)),  # copied by threads, two chunks in shared memory
        ("sm_86", "gated_delta_net_2", (1, 1, 1, 128, 64)),  # one chunk, keys in two groups
        ("sm_90", "delta_net", (1, 1, 1, 64, 64)),  # room for several chunks
    ],
)
def test_by_what_every_generation_has(generation, member, shape):
    inputs, cotangents = problem(member, time=130, shape=shape)
    with interpreted_gpu(generation):
        got = evaluate(member, inputs, jnp.bfloat16, cotangents, implementation="mosaic_mma")
    assert beyond_rounding(member, "plain", inputs, cotangents, got) == []


@pytest.mark.parametrize(
    ("member", "implementation"), [("gated_delta_net", "mosaic_gpu"), ("gated_delta_net_2", "mosaic_mma")]
)
@pytest.mark.parametrize(
    ("dtype", "limit"), [("float32", 2**-14), pytest.param("float16", 2**-10, marks=pytest.mark.slow)]
)
def test_float32_and_float16_are_split(member, implementation, dtype, limit):
    inputs, cotangents = problem(member, **SIZES)
    inputs, cotangents = jax.tree.map(lambda x: np.asarray(x, dtype).astype(np.float64), (inputs, cotangents))
    got = evaluate(member, inputs, jnp.dtype(dtype), cotangents, implementation=implementation)
    for name, x in reference(member, inputs, cotangents).items():
        assert relative_error(got[name], x) < limit, name


def test_what_fits_no_shared_memory_is_refused():
    """Float32 is twice as large; a kernel that is proven for bfloat16 is no automatic choice for it."""
    q = jnp.ones((1, 4, 2, 128), jnp.float32)
    with interpreted_gpu("sm_89"):
        with pytest.raises(
            ValueError, match=r"with keys of 128 in float32 .* KiB of shared memory, and this GPU has 99"
        ):
            delta_rule(q, q, q, implementation="pallas")
        assert choose(None, Arguments(q, q, q, None, None, None, None, None)).name == "xla"
    half = q.astype(jnp.bfloat16)
    assert choose(None, Arguments(q, q, q, None, None, None, None, None)).name == "xla"
    assert choose(None, Arguments(half, half, half, None, None, None, None, None)).name == "mosaic_gpu"


def test_what_they_refuse():
    q = jnp.ones((1, 4, 2, 64), jnp.bfloat16)
    wide = jnp.ones((1, 4, 2, 192), jnp.bfloat16)
    for arguments, message in (
        ((wide, wide, q), "the Pallas GPU kernels take key sizes of 64, 128, 256, not 192"),
        ((q, q, wide), "the Pallas GPU kernels take value sizes of 64, 128, 256, 512, not 192"),
    ):
        with pytest.raises(ValueError, match=f"implementation='mosaic_gpu' cannot run here: {message}"):
            delta_rule(*arguments, implementation="mosaic_gpu")
        assert delta_rule(*arguments)[0].shape == arguments[2].shape  # the automatic choice finds another way
    assert implementations()["pallas"] is None
    with mock.patch.object(devices, "generation", return_value=None):  # a GPU of another maker
        assert "this is another GPU" in implementations()["pallas"]
        assert delta_rule(q, q, q)[0].shape == q.shape
