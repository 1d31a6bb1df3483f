import jax
import jax.numpy as jnp
import numpy as np
import pytest

from delta_jax.inference import Sampling, keep_min_p, keep_top_k, keep_top_p, penalize, sample

LOGITS = jnp.log(jnp.array([[0.1, 0.4, 0.2, 0.3], [0.25, 0.25, 0.25, 0.25]]))


def kept(logits):
    return np.isfinite(logits).tolist()


@pytest.mark.parametrize(
    ("k", "wanted"),
    [
        (1, [[False, True, False, False], [True, False, False, False]]),
        (3, [[False, True, True, True], [True, True, True, False]]),
        (9, [[True] * 4, [True] * 4]),
    ],
)
def test_top_k_keeps_exactly_k(k, wanted):
    masked = keep_top_k(LOGITS, k)
    assert kept(masked) == wanted
    np.testing.assert_array_equal(np.where(wanted, masked, 0), np.where(wanted, LOGITS, 0))


@pytest.mark.parametrize(
    ("p", "wanted"),
    [
        (0.01, [[False, True, False, False], [True, False, False, False]]),
        (0.39, [[False, True, False, False], [True, True, False, False]]),
        (0.41, [[False, True, False, True], [True, True, False, False]]),
        (0.8, [[False, True, True, True], [True, True, True, True]]),
        (1.0, [[True] * 4, [True] * 4]),
    ],
)
def test_top_p_keeps_the_smallest_set(p, wanted):
    masked = keep_top_p(LOGITS, p)
    assert kept(masked) == wanted
    np.testing.assert_array_equal(np.where(wanted, masked, 0), np.where(wanted, LOGITS, 0))


@pytest.mark.parametrize(
    ("p", "wanted"),
    [
        (0.8, [[False, True, False, False], [True] * 4]),
        (0.74, [[False, True, False, True], [True] * 4]),
        (0.3, [[False, True, True, True], [True] * 4]),
        (1.0, [[False, True, False, False], [True] * 4]),
        (0.0, [[True] * 4, [True] * 4]),
    ],
)
def test_min_p_is_a_share_of_the_greatest(p, wanted):
    masked = keep_min_p(LOGITS, p)
    assert kept(masked) == wanted
    np.testing.assert_array_equal(np.where(wanted, masked, 0), np.where(wanted, LOGITS, 0))


def test_penalty():
    """As transformers' RepetitionPenaltyLogitsProcessor: positive logits are divided, negative ones multiplied."""
    logits = jnp.array([3.0, -3.0, 0.0, 3.0, -jnp.inf, jnp.inf])
    seen = jnp.array([True, True, True, False, True, True])
    np.testing.assert_allclose(penalize(logits, seen, 1.5), [2.0, -4.5, 0.0, 3.0, -np.inf, np.finfo(np.float32).max])
    np.testing.assert_allclose(penalize(logits, seen, 0.5)[:4], [6.0, -1.5, 0.0, 3.0])
    assert penalize(logits[:4], seen[:4], 1e-300)[0] < np.inf
    both = jnp.stack([logits[:4], -logits[:4]])
    assert sample(both, Sampling(repetition_penalty=100.0), seen=jnp.stack([seen[:4], ~seen[:4]])).tolist() == [3, 1]
    with pytest.raises(ValueError, match="seen must be given for a repetition_penalty"):
        sample(both, Sampling(repetition_penalty=2.0))
    with pytest.raises(ValueError, match="penalty must be a positive number"):
        penalize(logits, seen, 0)
    with pytest.raises(ValueError, match=r"p must lie in \[0, 1\]"):
        keep_min_p(logits, 1.5)


def test_top_p_of_large_vocabularies_matches_a_sort_in_float64():
    logits = 3.0 * jax.random.normal(jax.random.key(0), (5, 1000))
    wide = np.asarray(logits, np.float64)
    for row, masked in zip(wide, np.asarray(keep_top_p(logits, 0.9)), strict=True):
        order = np.argsort(-row)
        probabilities = np.exp(row[order]) / np.exp(row).sum()
        size = int(np.searchsorted(np.cumsum(probabilities), 0.9)) + 1
        assert set(np.flatnonzero(np.isfinite(masked))) == set(order[:size])


def draw(logits, sampling, count=20000):
    keys = jax.random.split(jax.random.key(1), count)
    tokens = sample(jnp.tile(logits, (count, 1)), sampling, keys)
    return np.bincount(np.asarray(tokens), minlength=logits.shape[-1]) / count


@pytest.mark.parametrize(
    ("sampling", "wanted"),
    [
        (Sampling(temperature=1.0), [0.1, 0.4, 0.2, 0.3]),
        (Sampling(temperature=0.5), np.square([0.1, 0.4, 0.2, 0.3]) / 0.30),
        (Sampling(temperature=1.0, top_k=2), [0, 4 / 7, 0, 3 / 7]),
        (Sampling(temperature=1.0, top_p=0.8), [0, 4 / 9, 2 / 9, 3 / 9]),
        (Sampling(temperature=1.0, top_k=3, top_p=0.7), [0, 4 / 7, 0, 3 / 7]),
        (Sampling(temperature=1.0, min_p=0.6), [0, 4 / 7, 0, 3 / 7]),
        (Sampling(temperature=1.0, top_p=0.8, min_p=0.3), [0, 4 / 9, 2 / 9, 3 / 9]),
        (Sampling(temperature=0.5, min_p=0.6), [0, 1, 0, 0]),
        # The temperature comes first: the squared probabilities of the two likeliest sum to 0.83.
        (Sampling(temperature=0.5, top_p=0.8), [0, 16 / 25, 0, 9 / 25]),
    ],
)
def test_draws_follow_the_distribution(sampling, wanted):
    shares = draw(LOGITS[0], sampling)
    np.testing.assert_allclose(shares, wanted, atol=0.015)
    assert (shares[np.asarray(wanted) == 0] == 0).all()


@pytest.mark.parametrize("temperature", [1e-10, 1e-40, 5e-324, 1e30, 1e300])
def test_any_temperature_draws_right(temperature):
    """No overflow in float32: near zero only the likeliest, equal ones alike; far above all alike, what is -inf never."""
    logits = jnp.array([-1e5, 300.0, -jnp.inf, 300.0])
    shares = draw(logits, Sampling(temperature=temperature, top_p=0.999), count=2000)
    wanted = [0, 1 / 2, 0, 1 / 2] if temperature < 1 else [1 / 3, 1 / 3, 0, 1 / 3]
    np.testing.assert_allclose(shares, wanted, atol=0.05)
    assert (shares[np.asarray(wanted) == 0] == 0).all()


@pytest.mark.usefixtures("as_users_call")  # an integer is a number
def test_limits_of_top_k_and_top_p():
    logits = jax.random.normal(jax.random.key(4), (50,))
    everything = draw(logits, Sampling(temperature=2.0), 1000)
    for options in ({"top_p": 1.0}, {"top_k": 50}, {"top_k": 2**70}, {"top_k": 10**5, "top_p": 1}):
        np.testing.assert_array_equal(draw(logits, Sampling(temperature=2.0, **options), 1000), everything)
    for options in ({"top_p": 1e-60}, {"top_k": 1}):
        assert draw(logits, Sampling(temperature=2.0, **options), 1000)[jnp.argmax(logits)] == 1
    shares = draw(jnp.zeros(8), Sampling(temperature=1.0, top_p=0.5), 1000)  # of equal ones the lower ids
    assert (shares[:4] > 0.2).all() and (shares[4:] == 0).all()


def test_top_p_of_one_keeps_what_rounding_would_lose():
    """In float32 the sum of these probabilities reaches 1 before the last of them."""
    logits = jnp.concatenate([jnp.zeros(3000), jnp.full((3,), -17.0)])
    assert np.isfinite(keep_top_p(logits, 1.0)).all()
    assert not np.isfinite(keep_top_p(logits, 0.9999)).all()


def test_greedy_takes_the_likeliest_and_the_lower_id_of_equals():
    assert sample(LOGITS, Sampling()).tolist() == [1, 0]
    assert sample(LOGITS, Sampling()).dtype == jnp.int32


def test_rows_draw_on_their_own():
    keys = jax.random.split(jax.random.key(3), 2)
    logits = jax.random.normal(jax.random.key(4), (2, 50))
    both = sample(logits, Sampling(temperature=1.0), keys)
    assert both[1] == sample(logits[1:], Sampling(temperature=1.0), keys[1:])[0]


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"temperature": 1.0, "top_k": 0}, "top_k"),
        ({"temperature": True}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": 1.0, "top_k": 2.5}, "top_k"),
        ({"temperature": 1.0, "top_k": True}, "top_k"),
        ({"temperature": 1.0, "top_p": float("nan")}, "top_p"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p"),
        ({"temperature": 1.0, "top_p": 1.1}, "top_p"),
        ({"top_k": 4}, "temperature"),
        ({"min_p": 0.5}, "temperature"),
        ({"temperature": 1.0, "min_p": -0.1}, "min_p"),
        ({"temperature": 1.0, "min_p": 10**400}, "min_p"),
        ({"temperature": 1.0, "top_p": 10**400}, "top_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": -1.0}, "repetition_penalty"),
    ],
)
def test_impossible_options_are_named(options, word):
    with pytest.raises(ValueError, match=word):
        Sampling(**options)


def test_drawing_needs_keys():
    with pytest.raises(ValueError, match="keys"):
        sample(LOGITS, Sampling(temperature=1.0))
