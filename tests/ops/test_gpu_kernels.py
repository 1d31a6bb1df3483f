"""The contract of the op for the GPU kernels, which take bfloat16: interpreted on the CPU, every member."""

import contextlib
from collections.abc import Iterator
from unittest import mock

import jax.numpy as jnp
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from members import MEMBERS, evaluate, problem, reference, relative_error, rounded

from delta_jax.ops import api
from pallas_kernels.gpu import warpgroup

SIZES = {"time": 140, "shape": (1, 1, 2, 64, 64)}
MEMBERS = {
    n: x for n, x in MEMBERS.items() if n not in ("gated_linear_attention", "kimi_delta_attention", "gated_delta_net_2")
}
each_member = pytest.mark.parametrize("member", MEMBERS)


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """The kernels of a Hopper GPU run in interpretation on the CPU."""
    with (
        mock.patch.object(api, "platform", return_value="gpu"),
        mock.patch.object(api, "hopper", return_value=True),
        mock.patch.object(warpgroup, "INTERPRET", plgpu.InterpretGPUParams()),
    ):
        yield


@pytest.fixture(autouse=True)
def _interpreted():
    with interpreted():
        yield


def as_good_as_rounding(got, want, inputs, cotangents, member, times=2.0, **options):
    """No output or gradient is further from the reference than `times` what rounding inputs and results does to it."""
    best = reference(member, {n: rounded(x) for n, x in inputs.items()}, tuple(map(rounded, cotangents)), **options)
    for name, x in want.items():
        limit = times * relative_error(best[name] if name == "state" else rounded(best[name]), x)
        assert relative_error(got[name], x) <= limit, f"{name}: {relative_error(got[name], x):.2e} > {limit:.2e}"


@each_member
def test_as_good_as_rounding_the_inputs(member):
    """Inputs a model has, and the hard ones that bfloat16 can hold: one compiled program a member."""
    for hard in ("plain", "gate_-1e4_sometimes", "repeated_keys"):
        inputs, cotangents = problem(member, hard, **SIZES)
        want = reference(member, inputs, cotangents)
        if hard == "repeated_keys":  # a token overwrites what the gates have scaled: what they change is only rounding
            want.pop("d_g", None)
        got = evaluate(member, inputs, jnp.bfloat16, cotangents, implementation="pallas")
        try:
            as_good_as_rounding(got, want, inputs, cotangents, member, 3.0 if hard == "repeated_keys" else 2.0)
        except AssertionError as error:
            raise AssertionError(f"{hard}: {error}") from None


@each_member
def test_step_by_step_equals_the_whole(member):
    inputs, _ = problem(member, **(SIZES | {"time": 9}))
    arrays = {name: jnp.asarray(x, jnp.bfloat16) for name, x in inputs.items()}
    state = arrays.pop("initial_state").astype(jnp.float32)
    whole, final = op_of(member)(**arrays, initial_state=state, implementation="recurrent")
    if op_of(member) is not delta_rule:
        arrays["erase"] = jnp.zeros_like(arrays["k"])
    step = jax.jit(lambda token, state: delta_rule_step(**token, state=state, implementation="pallas"))
    for t in range(9):
        o, state = step({f"{name}_t": x[:, t] for name, x in arrays.items()}, state)
        assert relative_error(np.asarray(o, np.float64), np.asarray(whole[:, t], np.float64)) < 2**-8
    assert relative_error(np.asarray(state), np.asarray(final)) < 1e-6


def test_what_they_refuse():
    q = jnp.ones((1, 4, 2, 64), jnp.bfloat16)
    wide = jnp.ones((1, 4, 2, 192), jnp.bfloat16)
    for arguments, message in (
        ((q.astype(jnp.float32),) * 3, "the Pallas GPU kernels take bfloat16, not float32"),
        ((wide, wide, q), "the Pallas GPU kernels take key sizes of 64, 128, 256, not 192"),
        ((q, q, wide), "the Pallas GPU kernels take value sizes of 64, 128, 256, not 192"),
    ):
        with pytest.raises(ValueError, match=f"implementation='pallas' cannot run here: {message}"):
            delta_rule(*arguments, implementation="pallas")
        assert delta_rule(*arguments)[0].shape == arguments[2].shape  # the automatic choice finds another way
    assert implementations()["pallas"] is None
    with mock.patch.object(api, "hopper", return_value=False):
        assert "this is another GPU" in implementations()["pallas"]
        assert delta_rule(q, q, q)[0].shape == q.shape
