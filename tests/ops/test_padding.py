"""Padding of the op's arrays, and the final states of packed segments, against separate sequences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from delta_jax.ops import delta_rule, segment_states, skip_tokens
from delta_jax.testing import op_of, problem
from delta_jax.testing.comparison import QUICK

TIME, SHAPE = 21, (2, 1, 2, 6, 5)
MASK = np.zeros((2, TIME), bool)
MASK[0, 4:17], MASK[1, :9] = True, True
MASK[0, 8:11] = False  # a hole is padding too
IDS = np.array([[3] * 6 + [1] + [3] * 14, [0] * 12 + [7] * 9], np.int32)

CASES = pytest.mark.parametrize(
    ("member", "implementation"),
    [
        ("mamba2", "xla"),
        ("kimi_delta_attention", "xla"),
        ("gated_delta_net_2", "recurrent"),
        ("gated_delta_product", "xla"),
    ],
)
jit = functools.partial(jax.jit, compiler_options=QUICK)


def make(member):
    """Inputs, initial state, and the cotangents of outputs and state."""
    inputs, cotangents = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), problem(member, time=TIME, shape=SHAPE))
    return inputs, inputs.pop("initial_state"), cotangents


def spread(mask, x):
    return mask.reshape(mask.shape + (1,) * (x.ndim - 2))


@CASES
def test_padding_is_as_if_it_were_not_there(member, implementation):
    """Anywhere in the row; that padding at the end of one is, the next test says."""
    inputs, initial, cotangents = make(member)

    @jit
    def run(inputs, initial, mask, ids, d_o, d_state):
        def function(inputs, initial):
            skipped = skip_tokens(mask, **inputs, segment_ids=ids)
            return op_of(member)(**skipped, initial_state=initial, implementation=implementation)

        (o, state), vjp = jax.vjp(function, inputs, initial)
        return {"o": o} | vjp((d_o, d_state))[0], (state, vjp((d_o, d_state))[1])

    ids = np.where(np.arange(TIME) < 12, 1, 2) + np.zeros((2, 1), np.int32)
    order, end = np.argsort(~MASK, axis=1, kind="stable"), np.sort(~MASK, axis=1) == 0

    def at_front(x):
        return jnp.take_along_axis(x, spread(order, x), axis=1)

    poisoned = jax.tree.map(lambda x: jnp.where(spread(MASK, x), x, jnp.nan), inputs)
    per_token, states = run(poisoned, initial, MASK, np.where(MASK, ids, 9), *cotangents)
    wanted, last = run(
        jax.tree.map(at_front, inputs), initial, end, at_front(ids), at_front(cotangents[0]), cotangents[1]
    )
    for name, x in per_token.items():
        assert not np.any(np.asarray(x)[~MASK]), name
        np.testing.assert_allclose(np.asarray(x)[MASK], np.asarray(wanted[name])[end], atol=1e-5, err_msg=name)
    for one, other in zip(states, last, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_padding_at_the_end_equals_the_shorter_call():
    """The neutral element itself, against an op that has never heard of it."""
    inputs, initial, _ = make("kimi_delta_attention")
    mask = jnp.arange(TIME)[None] < jnp.array([[13], [13]])
    o, state = delta_rule(**skip_tokens(mask, **inputs), initial_state=initial)
    short, last = delta_rule(**jax.tree.map(lambda x: x[:, :13], inputs), initial_state=initial)
    np.testing.assert_allclose(o[:, :13], short, atol=2e-6)
    np.testing.assert_allclose(state, last, atol=2e-6)
    assert not np.any(o[:, 13:])


@CASES
def test_states_of_segments_equal_those_of_separate_calls(member, implementation):
    inputs, initial, (d_o, _) = make(member)
    op = functools.partial(op_of(member), implementation=implementation)
    weights = jax.random.normal(jax.random.key(0), (2, 3, *initial.shape[1:]))

    @jit
    def packed(inputs, initial):
        def loss(inputs, initial):
            o, states = segment_states(
                op, **inputs, initial_state=initial, segment_ids=jnp.asarray(IDS), max_segments=3, max_length=16
            )
            return jnp.sum(d_o * o) + jnp.sum(weights * states), (o, states)

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(inputs, initial)

    @jit
    def alone(inputs, initial, mask, weights):
        def loss(inputs, initial):
            o, state = op(**skip_tokens(mask, **inputs), initial_state=initial)
            return jnp.sum(d_o * o, where=mask[..., None, None]) + jnp.sum(weights * state), (o, state)

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(inputs, initial)

    (d_inputs, d_initial), (o, states) = packed(inputs, initial)
    assert states.shape == weights.shape
    assert not np.any(states[1, 2])  # the second row has two segments only
    run = np.cumsum(np.diff(IDS, axis=1, prepend=IDS[:, :1]) != 0, axis=1)
    for place in range(3):
        mask = run == place
        first = initial if place == 0 else jnp.zeros_like(initial)
        (d_alone, d_first), (piece, state) = alone(inputs, first, mask, weights[:, place])
        np.testing.assert_allclose(states[:, place], state, atol=1e-5)
        for one, other in ((o, piece), *((d_inputs[name], d_alone[name]) for name in inputs)):
            np.testing.assert_allclose(np.asarray(one)[mask], np.asarray(other)[mask], atol=1e-5)
        if place == 0:
            np.testing.assert_allclose(d_initial, d_first, atol=1e-5)


def test_a_segment_keeps_its_poison_to_itself():
    inputs, _, _ = make("gated_delta_net")
    bad = jax.tree.map(lambda x: x.at[0, 6].set(jnp.nan), inputs)
    call = functools.partial(segment_states, delta_rule, segment_ids=jnp.asarray(IDS), max_segments=3)

    @jit
    def run(inputs):
        return *call(**inputs), jax.grad(lambda x: jnp.sum(call(**x)[1][:, ::2]))(inputs)

    (o, states, gradients), (clean_o, clean, wanted) = run(bad), run(inputs)
    np.testing.assert_array_equal(np.isnan(o).any(axis=(2, 3)), np.arange(TIME) == np.array([[6], [-1]]))
    np.testing.assert_array_equal(jnp.delete(o, 6, axis=1), jnp.delete(clean_o, 6, axis=1))
    assert np.isnan(states[0, 1]).all()
    np.testing.assert_array_equal(states[1], clean[1])
    np.testing.assert_array_equal(states[0, ::2], clean[0, ::2])
    for name, d in gradients.items():  # but for its own
        np.testing.assert_array_equal(jnp.delete(d, 6, axis=1), jnp.delete(wanted[name], 6, axis=1), err_msg=name)


def test_what_does_not_fit_is_refused_or_nan():
    inputs, _, _ = make("delta_net")
    call = functools.partial(segment_states, delta_rule, **inputs)
    with pytest.raises(
        ValueError, match="max_segments must be at least 3, as there are so many segments in a row, got 2"
    ):
        call(segment_ids=jnp.asarray(IDS), max_segments=2)
    with pytest.raises(ValueError, match="max_length must be at least 14"):
        call(segment_ids=jnp.asarray(IDS), max_segments=3, max_length=13)
    with pytest.raises(ValueError, match="max_length must be a positive integer, got 0"):
        call(segment_ids=jnp.asarray(IDS), max_segments=3, max_length=0)
    o, states = jax.jit(functools.partial(call, max_segments=2, max_length=12))(segment_ids=jnp.asarray(IDS))
    wanted, _ = delta_rule(**inputs, segment_ids=jnp.asarray(IDS))
    assert np.isnan(o[0, 7:]).all()  # a third segment
    np.testing.assert_allclose(o[0, :7], wanted[0, :7], atol=2e-6)
    np.testing.assert_allclose(o[1], wanted[1], atol=2e-6)
    assert np.isfinite(states).all()
    _, states = jax.jit(functools.partial(call, max_segments=3, max_length=12))(segment_ids=jnp.asarray(IDS))
    np.testing.assert_array_equal(np.isnan(states).any(axis=(2, 3, 4)), [[False, False, True], [False] * 3])


@pytest.mark.parametrize("mask", [np.ones((2, TIME)), np.ones((2, TIME - 1), bool), None, True])
def test_a_mask_that_is_none_is_named(mask):
    inputs, _, _ = make("delta_net")
    with pytest.raises(ValueError, match=r"mask must be bool \[batch, time\], here \[2, 21\], true for real tokens"):
        skip_tokens(mask, **inputs)
