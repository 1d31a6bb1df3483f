"""The contract of the op, over every member and every implementation, against the recurrence in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from delta_jax import delta_product
from delta_jax.testing import (
    HARD,
    MEMBERS,
    TRIALS,
    beyond_rounding,
    evaluate,
    op_of,
    problem,
    reference,
    relative_error,
    step_of,
)
from delta_jax.testing.members import HEADS, KEY, TIME, VALUE

EXACT = {name: trial for name, trial in TRIALS.items() if "float32" in trial.dtypes}
each_member = pytest.mark.parametrize("member", MEMBERS)
each_member_and_case = pytest.mark.parametrize(
    ("implementation", "chunk_size", "member"),
    [(name, size, m) for name, trial in EXACT.items() for size in trial.chunk_sizes for m in trial.members],
)
each_member_and_implementation = pytest.mark.parametrize(
    ("implementation", "member"), [(name, m) for name, trial in EXACT.items() for m in trial.members]
)


def sizes(implementation):
    return TRIALS[implementation].sizes


def alone(implementation):
    """Sizes where values are the question and not heads: interpretation takes its time for each of them."""
    return {"time": 140, "shape": (1, 1, 1, 64, 64)} if TRIALS[implementation].interpreted else {}


def assert_exact(got, want, outputs=2e-6, gradients=1e-5, nearby=None):
    """Within the limit, or within what the last bit of the keys decides (`nearby` is the reference without it)."""
    for name, x in want.items():
        limit = gradients if name.startswith("d_") else outputs
        limit = max(limit, relative_error(nearby[name], x) if nearby else 0.0)
        assert relative_error(got[name], x) <= limit, f"{name}: {relative_error(got[name], x):.2e} > {limit:.2e}"


@each_member_and_case
def test_float32_on_hard_inputs(member, implementation, chunk_size):
    for hard in HARD:
        inputs, cotangents = problem(member, hard, **alone(implementation))
        want = reference(member, inputs, cotangents)
        got = evaluate(member, inputs, np.float32, cotangents, implementation=implementation, chunk_size=chunk_size)
        nearby = None
        if member == "negative_eigenvalues" and hard in ("repeated_keys", "reflections"):
            # Eigenvalues of -1 and no decay: what was rounded once, |k|^2 above all, is never forgotten. Tiles of 128
            # round two bits more of it than chunks of 64.
            last_bit = 2.0**-21 if TRIALS[implementation].interpreted else 2.0**-23
            nearby = reference(member, inputs | {"k": inputs["k"] * (1 + last_bit)}, cotangents)
        try:
            assert_exact(got, want, nearby=nearby)
        except AssertionError as error:
            raise AssertionError(f"{hard}: {error}") from None


@each_member
def test_float64_is_exact_at_every_chunk_size(member):
    for hard in ("plain", "gate_-1e4_sometimes", "reflections"):
        inputs, cotangents = problem(member, hard)
        want = reference(member, inputs, cotangents)
        for chunk_size in (None, 32 if op_of(member) is delta_product else 128):
            with jax.enable_x64(True):
                got = evaluate(member, inputs, np.float64, cotangents, implementation="xla", chunk_size=chunk_size)
            assert_exact(got, want, 1e-13, 1e-12)


@pytest.mark.parametrize(
    ("implementation", "member"), [(name, m) for name, trial in TRIALS.items() for m in trial.members]
)
def test_bfloat16_is_as_good_as_rounding_the_inputs(member, implementation):
    """Inputs a model has, and hard ones that bfloat16 can hold."""
    gated = "g" in problem(member, time=1)[0]
    for hard in ("plain", "repeated_keys", "gate_-1e4_sometimes" if gated else "zeros"):
        inputs, cotangents = problem(member, hard, **sizes(implementation))
        got = evaluate(member, inputs, jnp.bfloat16, cotangents, implementation=implementation)
        assert beyond_rounding(member, hard, inputs, cotangents, got) == []


@pytest.mark.parametrize("implementation", ["recurrent", "xla"])
def test_float16_runs_and_is_close(implementation):
    inputs, cotangents = problem("gated_delta_net")
    want = reference("gated_delta_net", inputs, cotangents)
    got = evaluate("gated_delta_net", inputs, jnp.float16, cotangents, implementation=implementation)
    assert_exact(got, want, 2e-3, 4e-3)


@each_member_and_implementation
def test_packed_segments_equal_separate_calls(member, implementation):
    inputs, cotangents = problem(member, **sizes(implementation))
    batch, time = inputs["q"].shape[:2]
    lengths = [17, 1, 40, time - 58]
    segment_ids = np.repeat([3, 9, 3, 4], lengths)[None].repeat(batch, 0)
    want = reference(member, inputs, cotangents, segment_ids=segment_ids)
    pieces, start = [], 0
    for number, length in enumerate(lengths):
        piece = {name: x[:, start : start + length] for name, x in inputs.items() if name != "initial_state"}
        piece["initial_state"] = inputs["initial_state"] * (number == 0)
        last = number == len(lengths) - 1
        pieces.append(reference(member, piece, (cotangents[0][:, start : start + length], cotangents[1] * last)))
        start += length
    for name, x in want.items():
        if name in ("state", "d_initial_state"):
            assert relative_error(x, pieces[-1 if name == "state" else 0][name]) <= 1e-13
        else:
            assert relative_error(x, np.concatenate([piece[name] for piece in pieces], 1)) <= 1e-13
    got = evaluate(member, inputs, np.float32, cotangents, implementation=implementation, segment_ids=segment_ids)
    assert_exact(got, want)


def of_tokens(result, tokens):
    """Outputs and gradients at some tokens, and what belongs to none."""
    whole = ("state", "d_initial_state")
    return {name: x if name in whole else x[:, tokens] for name, x in result.items()}


@each_member_and_implementation
def test_what_is_not_finite_reaches_no_other_segment(member, implementation):
    """Whatever a segment holds: outputs, states and gradients of the others are what they are without it."""
    inputs, cotangents = problem(member, **sizes(implementation))
    batch, time = inputs["q"].shape[:2]
    segment_ids = np.repeat([3, 9, 3, 4], [17, 1, 40, time - 58])[None].repeat(batch, 0)
    want = reference(member, inputs, cotangents, segment_ids=segment_ids)
    poison = itertools.cycle((np.nan, np.inf, 1e30, -np.inf))
    every = [(name, next(poison), 18 + 7 * n) for n, name in enumerate(sorted(inputs.keys() - {"initial_state"}))]
    kinds = [every, [(name, 1e30, slice(18, 58)) for name in ("k", "v")]]  # the second overflows on its way
    if "g" in inputs:
        kinds.append([("g", 3.0, slice(18, 58))])  # as does the third
    if not TRIALS[implementation].interpreted:  # interpretation takes its time
        kinds += [[(name, value, 30)] for name, _, _ in every for value in (np.nan, np.inf, 1e30)]
    for kind in kinds:
        bad = {name: x.copy() for name, x in inputs.items()}
        for name, value, place in kind:
            bad[name][:, place] = value
        got = evaluate(member, bad, np.float32, cotangents, implementation=implementation, segment_ids=segment_ids)
        for tokens in (slice(0, 18), slice(58, None)):
            try:
                assert_exact(of_tokens(got, tokens), of_tokens(want, tokens))
            except AssertionError as error:
                raise AssertionError(f"{kind}: {error}") from None


@each_member_and_implementation
def test_what_is_not_finite_reaches_no_earlier_token(member, implementation):
    """A loss over the tokens before has its gradient, except by differentiating the definition, which multiplies."""
    inputs, (d_o, d_state) = problem(member, **sizes(implementation))
    batch, time = inputs["q"].shape[:2]
    segment_ids = np.repeat([3, 4], [17, time - 17])[None].repeat(batch, 0)
    start = time - 20
    cotangents = d_o * (np.arange(time) < start)[None, :, None, None], 0 * d_state
    want = reference(member, inputs, cotangents, segment_ids=segment_ids)
    bad = {name: x.copy() for name, x in inputs.items()}
    for name in inputs.keys() - {"initial_state"}:
        bad[name][:, start::3] = np.nan
    got = evaluate(member, bad, np.float32, cotangents, implementation=implementation, segment_ids=segment_ids)
    assert not np.isfinite(got["o"][:, start:]).any()  # and nothing is hidden
    assert not np.isfinite(got["state"]).any()
    got, want = (of_tokens(x, slice(0, start)) for x in (got, want))
    compared = ("o",) if implementation == "recurrent" else want.keys() - {"state"}
    assert_exact({name: got[name] for name in compared}, {name: want[name] for name in compared})


@each_member_and_implementation
def test_gates_above_zero_in_short_segments(member, implementation):
    """Over all segments their sum is far beyond what any dtype's exponential holds."""
    inputs, cotangents = problem(member, **sizes(implementation))
    if "g" not in inputs:
        pytest.skip("a member without gates")
    batch, time = inputs["q"].shape[:2]
    inputs["g"] = np.full_like(inputs["g"], 3.0)
    segment_ids = (np.arange(time) // 8)[None].repeat(batch, 0)
    want = reference(member, inputs, cotangents, segment_ids=segment_ids)
    assert np.abs(want["o"]).max() > 1e5
    got = evaluate(member, inputs, np.float32, cotangents, implementation=implementation, segment_ids=segment_ids)
    assert_exact(got, want)


@each_member_and_implementation
def test_splitting_and_carrying_the_state_equals_one_call(member, implementation):
    inputs, _ = problem(member, **sizes(implementation))
    arrays = {name: jnp.asarray(x, jnp.float32) for name, x in inputs.items()}
    op, time = op_of(member), inputs["q"].shape[1]
    whole, state = op(**arrays, implementation=implementation)
    parts, carried = [], arrays["initial_state"]
    # The kernels pad to 128 tokens, and take long to compile in interpretation: two halves are one program.
    cuts = (0, time // 2, time) if TRIALS[implementation].interpreted else (0, 37, 38, time)
    for start, stop in itertools.pairwise(cuts):
        piece = {name: x[:, start:stop] for name, x in arrays.items() if name != "initial_state"}
        o, carried = op(**piece, initial_state=carried, implementation=implementation)
        parts.append(o)
    assert relative_error(np.concatenate(parts, 1), whole) < 2e-6
    assert relative_error(carried, state) < 2e-6


@each_member_and_implementation
def test_step_by_step_equals_the_whole(member, implementation):
    inputs, _ = problem(member, **(sizes(implementation) | {"time": 9}))
    arrays = {name: jnp.asarray(x, jnp.float32) for name, x in inputs.items()}
    whole, final = op_of(member)(**arrays, implementation="xla")
    state = arrays.pop("initial_state")
    step = jax.jit(lambda token, state: step_of(member)(**token, state=state, implementation=implementation))
    for t in range(9):
        o, state = step({f"{name}_t": x[:, t] for name, x in arrays.items()}, state)
        assert relative_error(o, whole[:, t]) < 1e-6
    assert relative_error(state, final) < 1e-6


@each_member_and_case
def test_outputs_never_depend_on_later_inputs_and_runs_repeat(member, implementation, chunk_size):
    inputs, cotangents = problem(member, **sizes(implementation))
    options = {"implementation": implementation, "chunk_size": chunk_size}
    first = evaluate(member, inputs, np.float32, cotangents, **options)
    again = evaluate(member, inputs, np.float32, cotangents, **options)
    assert all(np.array_equal(first[name], again[name]) for name in first)
    other, _ = problem(member, "large_keys", seed=1, **sizes(implementation))
    for t in (1, 20, 66):
        changed = {
            name: x if name == "initial_state" else np.concatenate([x[:, :t], other[name][:, t:]], 1)
            for name, x in inputs.items()
        }
        later = evaluate(member, changed, np.float32, cotangents, **options)
        assert np.array_equal(first["o"][:, :t], later["o"][:, :t])
        assert not np.array_equal(first["o"][:, t:], later["o"][:, t:])


@pytest.mark.parametrize("time", [1, 15, 16, 17, 300])
def test_any_length(time):
    for member in ("gated_delta_net", "gated_delta_net_2"):
        inputs, cotangents = problem(member, time=time)
        got = evaluate(member, inputs, np.float32, cotangents, implementation="xla")
        assert_exact(got, reference(member, inputs, cotangents))


BOTH = ("gated_delta_net", "gated_delta_net_2")


@pytest.mark.parametrize(
    ("implementation", "time", "shape", "members"),
    [
        ("xla", TIME, (1, 4, 4, 8, 1), BOTH),
        ("xla", TIME, (3, 1, 3, 5, 40), BOTH),
        ("xla", TIME, (1, 2, 6, 32, 7), BOTH),
        # With two heads a grid step: an odd number of them; mixed sizes; several steps over batch and heads; keys that more
        # heads share than fit. How heads are grouped does not depend on the gate: one member shows it.
        ("mosaic_tpu", 20, (2, 3, 3, 128, 64), BOTH[:1]),
        ("mosaic_tpu", 129, (1, 1, 2, 192, 256), BOTH),
        ("mosaic_tpu", 20, (2, 2, 4, 128, 128), BOTH[1:]),
        ("mosaic_tpu", 20, (1, 1, 4, 128, 64), BOTH[1:]),
    ],
)
def test_head_groups_and_sizes(implementation, time, shape, members, monkeypatch):
    for name in ("MAX_HEADS", "WIDE_HEADS"):
        monkeypatch.setattr(f"pallas_kernels.tpu.op.{name}", 2)
    monkeypatch.setattr("pallas_kernels.tpu.plan.FEW_EXACT_TILES", 1)  # one tile is prepared ahead of the state
    for member in members:
        inputs, cotangents = problem(member, time=time, shape=shape)
        got = evaluate(member, inputs, np.float32, cotangents, implementation=implementation)
        assert_exact(got, reference(member, inputs, cotangents))


@pytest.mark.parametrize("implementation", ["mosaic_tpu"])
def test_states_kept_between_groups_of_tiles(implementation, monkeypatch):
    """1100 tokens are nine tiles, three groups of three; one tile is prepared ahead of the state."""
    monkeypatch.setattr("pallas_kernels.tpu.plan.FEW_EXACT_TILES", 1)
    inputs, cotangents = problem("gated_delta_net", time=1100, shape=(1, 1, 1, 64, 64))
    got = evaluate("gated_delta_net", inputs, np.float32, cotangents, implementation=implementation)
    assert_exact(got, reference("gated_delta_net", inputs, cotangents))


@pytest.mark.parametrize("member", ["gated_delta_net"])
@pytest.mark.parametrize(("implementation", "joined"), [("xla_parallel", 1), ("xla_parallel", 2**27), ("triton", 1)])
def test_states_pass_through_groups_of_chunks(implementation, member, joined, monkeypatch):
    """Two groups of three chunks, one after the other or joined."""
    monkeypatch.setattr("delta_jax.ops.transitions.JOINED", joined)
    monkeypatch.setattr("delta_jax.ops.chunkwise.BYTES_PER_GROUP", 2**19)
    inputs, cotangents = problem(member)
    # An option of its own, for what was compiled with other limits is kept.
    options = {"implementation": implementation, "chunk_size": 16, "scale": 0.5 + joined % 2}
    got = evaluate(member, inputs, np.float32, cotangents, **options)
    assert_exact(got, reference(member, inputs, cotangents, scale=options["scale"]))


@pytest.mark.parametrize("implementation", ["xla", "mosaic_tpu"])
def test_erase_keys_of_their_own_for_every_value_head(implementation):
    inputs, cotangents = problem("online_scaled", **sizes(implementation))
    shape = (*inputs["v"].shape[:3], inputs["k"].shape[3])
    inputs["erase"] = np.random.default_rng(3).standard_normal(shape) / shape[3] ** 0.5
    want = reference("online_scaled", inputs, cotangents)
    assert want["d_erase"].shape == shape
    assert_exact(evaluate("online_scaled", inputs, np.float32, cotangents, implementation=implementation), want)


@pytest.mark.parametrize("member", ["negative_eigenvalues", "gated_delta_net", "kimi_delta_attention"])
def test_error_does_not_grow_with_the_length(member):
    errors = []
    for time in (1024, 65536):
        inputs, cotangents = problem(member, time=time, shape=(1, 1, 1, 8, 8))
        got = evaluate(member, inputs, np.float32, cotangents, implementation="xla")
        want = reference(member, inputs, cotangents)
        assert_exact(got, want)
        errors.append({name: relative_error(got[name], x) for name, x in want.items()})
    for name in ("o", "d_q", "d_k", "d_v", "d_beta"):
        assert errors[1][name] <= 1.5 * errors[0][name], (name, errors[0][name], errors[1][name])


def test_error_of_reflections_stays_below_that_of_the_last_bit_of_the_keys():
    """beta = 2 and no decay keep every rounding for ever: the bound is what half a last bit of the keys changes."""
    inputs, cotangents = problem("negative_eigenvalues", "reflections", time=16384, shape=(1, 1, 1, 8, 8))
    want = reference("negative_eigenvalues", inputs, cotangents)
    nearby = reference("negative_eigenvalues", inputs | {"k": inputs["k"] * (1 + 2.0**-24)}, cotangents)
    for implementation in ("recurrent", "xla"):
        got = evaluate("negative_eigenvalues", inputs, np.float32, cotangents, implementation=implementation)
        assert_exact(got, want, 0.0, 0.0, nearby)


def test_value_size_is_what_the_state_holds():
    inputs, _ = problem("delta_net")
    _, state = op_of("delta_net")(**{name: jnp.asarray(x, jnp.bfloat16) for name, x in inputs.items()})
    assert state.shape == (2, HEADS, KEY, VALUE)
    assert state.dtype == jnp.float32
