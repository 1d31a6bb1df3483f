"""The mixture of experts against a loop over all experts, and the balancing of its loads."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from delta_jax.layers import MixtureOfExperts
from delta_jax.layers.mixture_of_experts import balanced_bias
from delta_jax.parallel import MeshConfig, make_mesh
from delta_jax.testing import relative_error

HIDDEN, EXPERTS = 12, 6
VARIANTS = {
    "kimi": {"num_experts_per_token": 2, "shared_expert_size": 10, "routed_scaling_factor": 2.5},
    "qwen": {"num_experts_per_token": 3, "shared_expert_size": 10, "router": "softmax", "use_shared_expert_gate": True},
    "all": {"num_experts_per_token": EXPERTS},
    "one": {"num_experts_per_token": 1, "routed_scaling_factor": 0.5},
    "raw": {"num_experts_per_token": 2, "router": "softmax", "normalize_weights": False, "routed_scaling_factor": 2.5},
    "grouped": {"num_experts_per_token": 3, "num_expert_groups": 3, "num_groups_per_token": 2},
    "halves": {"num_experts_per_token": 2, "num_expert_groups": 2, "normalize_weights": False},
}


@functools.cache
def make(name, **options):
    layer = MixtureOfExperts(
        HIDDEN, expert_size=8, num_experts=EXPERTS, initializer_std=0.4, **VARIANTS[name], **options, rngs=nnx.Rngs(0)
    )
    layer.expert_bias[...] = jnp.linspace(-0.1, 0.1, EXPERTS)
    return layer


def inputs(batch=4):
    return jax.random.normal(jax.random.key(1), (batch, 5, HIDDEN))


def value_and_gradients(layer, x):
    weights = jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)

    def loss(layer, x):
        y, load = layer(x)
        return jnp.sum(y * weights), (y, load)

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(layer, x)


def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))


def swiglu(x, gate, up, down):
    return (x @ gate * sigmoid(x @ gate) * (x @ up)) @ down


def by_loop(layer, x, options):
    """One token x in float64: every expert is computed, those not chosen weigh nothing."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), nnx.to_pure_dict(nnx.state(layer)))
    logits = x @ p["router"]["kernel"]
    scores = sigmoid(logits) if options.get("router") != "softmax" else np.exp(logits) / np.exp(logits).sum()
    wanted, groups = scores + p["expert_bias"], options.get("num_expert_groups", 1)
    if groups > 1:
        best = [sum(sorted(group)[-2:]) for group in wanted.reshape(groups, -1)]
        allowed = sorted(range(groups), key=lambda group: -best[group])[: options.get("num_groups_per_token", 1)]
        wanted = [w if n // (EXPERTS // groups) in allowed else -np.inf for n, w in enumerate(wanted)]
    chosen = np.argsort(-np.asarray(wanted), kind="stable")[: options["num_experts_per_token"]]
    total = scores[chosen].sum() if options.get("normalize_weights", True) else 1.0
    y = np.zeros(HIDDEN)
    for expert in range(EXPERTS):
        weight = options.get("routed_scaling_factor", 1.0) * scores[expert] / total if expert in chosen else 0.0
        y += weight * swiglu(x, *(p["experts"][name][expert] for name in ("gate_proj", "up_proj", "down_proj")))
    if "shared_expert_size" in options:
        shared = swiglu(x, *(p["shared"][name]["kernel"] for name in ("gate_proj", "up_proj", "down_proj")))
        y += shared * (sigmoid(x @ p["shared_gate"]["kernel"]) if options.get("use_shared_expert_gate") else 1.0)
    return y, np.bincount(chosen, minlength=EXPERTS)


@pytest.mark.parametrize("name", VARIANTS)
def test_equals_a_loop_over_all_experts(name):
    layer, x = make(name), inputs()
    (_, (y, load)), _ = jax.jit(value_and_gradients)(layer, x)
    rows = [by_loop(layer, row, VARIANTS[name]) for row in np.asarray(x, np.float64).reshape(-1, HIDDEN)]
    np.testing.assert_allclose(y.reshape(-1, HIDDEN), np.stack([row for row, _ in rows]), atol=2e-6, rtol=2e-5)
    np.testing.assert_array_equal(load, sum(load for _, load in rows))
    assert load.sum() == 20 * VARIANTS[name]["num_experts_per_token"]


def test_gradients_are_those_of_a_dense_sum():
    layer, x = make("kimi"), inputs()
    weights = jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)

    def dense(layer, x):
        chosen, weight = layer.route(x)
        weight = jnp.sum(jax.nn.one_hot(chosen, EXPERTS) * weight[..., None], axis=-2)
        gate, up, down = (layer.experts[name][...] for name in ("gate_proj", "up_proj", "down_proj"))
        hidden = jax.nn.silu(jnp.einsum("btd,edf->btef", x, gate)) * jnp.einsum("btd,edf->btef", x, up)
        return jnp.sum((jnp.einsum("btef,efd,bte->btd", hidden, down, weight) + layer.shared(x)) * weights)

    _, ours = jax.jit(value_and_gradients)(layer, x)
    wanted = jax.jit(jax.grad(dense, argnums=(0, 1)))(layer, x)
    for (path, one), other in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5, rtol=1e-4, err_msg=str(path))
        if "expert_bias" in str(path):
            np.testing.assert_array_equal(one, 0)
        else:
            assert np.abs(one).max() > 1e-2


@pytest.mark.parametrize("name", ["grouped", "halves"])
def test_groups_limit_the_choice(name):
    """An expert outside the best groups is not chosen whatever its bias, nor for want of positive scores inside."""
    layer, x, options = make(name), inputs(), VARIANTS[name]
    size, most = EXPERTS // options["num_expert_groups"], options.get("num_groups_per_token", 1)
    layer = nnx.clone(layer)
    for bias in (0.0, -5.0):
        layer.expert_bias[...] = layer.expert_bias[...] + bias
        chosen = np.asarray(layer.route(x)[0])
        assert all(len(set(row // size)) <= most for row in chosen.reshape(-1, chosen.shape[-1]))
        wanted = jax.nn.sigmoid(layer.router(x)) + layer.expert_bias[...][None, None]
        free = np.argsort(-np.asarray(wanted), axis=-1)[..., : chosen.shape[-1]]
        assert (np.sort(chosen) != np.sort(free)).any()  # the groups made a difference


def test_no_token_is_dropped_when_all_want_the_same_expert():
    layer, x = make("one"), inputs()
    layer = nnx.clone(layer)
    layer.expert_bias[...] = jnp.zeros(EXPERTS).at[4].set(9.0)
    y, load = layer(x)
    np.testing.assert_array_equal(load, [0, 0, 0, 0, 20, 0])
    wanted = 0.5 * swiglu(
        np.asarray(x), *(np.asarray(layer.experts[n][4]) for n in ("gate_proj", "up_proj", "down_proj"))
    )
    np.testing.assert_allclose(y, wanted, atol=1e-5)


def test_eight_devices_compute_as_one():
    layer, x = make("kimi"), inputs(8)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))

    def on_mesh(layer, x):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return value_and_gradients(layer, x)

    whole = NamedSharding(mesh, P())
    placed = jax.device_put(layer, whole), jax.device_put(x, NamedSharding(mesh, P(("data", "fsdp"))))
    one, eight = jax.jit(value_and_gradients)(layer, x), jax.jit(on_mesh, out_shardings=whole)(*placed)
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(jax.device_get(eight)), strict=True):
        np.testing.assert_allclose(left, right, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_types(dtype):
    y, _ = make("kimi", dtype=dtype)(inputs())
    wide, _ = make("kimi")(inputs())
    assert y.dtype == dtype
    assert relative_error(y, wide) < 0.02


def test_the_bias_moves_towards_equal_loads():
    bias = jnp.zeros((2, 4))
    load = jnp.array([[5, 5, 7, 3], [2, 3, 3, 3]])
    np.testing.assert_array_equal(balanced_bias(bias, load, 0.5), [[0, 0, -0.5, 0.5], [0.5, -0.5, -0.5, -0.5]])
    huge = jnp.array([2**28 + 1, 2**28, 2**28, 2**28])  # float32 would not see the difference
    np.testing.assert_array_equal(balanced_bias(jnp.zeros(4), huge, 1.0), [-1, 1, 1, 1])


def test_balancing_evens_out_the_loads():
    layer = nnx.clone(make("kimi"))
    layer.router.kernel[...] = layer.router.kernel[...].at[0].add(jnp.linspace(-1.0, 1.0, EXPERTS))
    x = inputs(64).at[..., 0].set(1.0)

    @jax.jit
    def step(layer, bias):
        layer.expert_bias[...] = bias
        load = layer(x)[1]
        return balanced_bias(bias, load, 0.005), load

    bias, spread = jnp.zeros(EXPERTS), []
    for _ in range(200):
        bias, load = step(layer, bias)
        spread.append(EXPERTS * int(load.max()) / int(load.sum()))
    assert spread[0] > 1.5
    assert spread[-1] < 1.1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"num_experts_per_token": 7},
            "num_experts_per_token must be at most num_experts, got 7 of 6",
        ),
        ({"num_experts_per_token": 0}, "num_experts_per_token must be a positive integer"),
        ({"num_experts": 0}, "num_experts must be a positive integer"),
        ({"expert_size": 2.5}, "expert_size must be a positive integer"),
        ({"shared_expert_size": -1}, "shared_expert_size must be a positive integer"),
        ({"shared_expert_size": 0, "use_shared_expert_gate": True}, "use_shared_expert_gate needs a shared expert"),
        ({"use_shared_expert_gate": 1}, "use_shared_expert_gate must be true or false"),
        ({"normalize_weights": None}, "normalize_weights must be true or false, got None"),
        ({"num_expert_groups": 0}, "num_expert_groups must be a positive integer, got 0"),
        (
            {"num_expert_groups": 4},
            "num_expert_groups must divide num_experts into groups of two at least, got 4 and 6",
        ),
        (
            {"num_expert_groups": 6},
            "num_expert_groups must divide num_experts into groups of two at least, got 6 and 6",
        ),
        ({"num_expert_groups": 3, "num_groups_per_token": 4}, "num_groups_per_token must be at most num_expert_groups"),
        ({"num_groups_per_token": 2}, "num_groups_per_token must be at most num_expert_groups, got 2 of 1"),
        (
            {"num_experts_per_token": 3, "num_expert_groups": 3},
            "num_experts_per_token must be at most what num_groups_per_token hold, got 3 of 1 groups of 2",
        ),
        ({"router": "hash"}, "router must be one of sigmoid, softmax, got 'hash'"),
        ({"routed_scaling_factor": 0.0}, "routed_scaling_factor must be a positive number"),
    ],
)
def test_impossible_options_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        MixtureOfExperts(
            HIDDEN,
            **({"expert_size": 8, "num_experts": EXPERTS, "num_experts_per_token": 2} | options),
            rngs=nnx.Rngs(0),
        )


@pytest.mark.parametrize("poison", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize("name", ["kimi", "qwen"])
def test_a_poisoned_token_reaches_no_other(name, poison):
    """Neither outputs, nor gradients of a loss without it, nor the load."""
    layer, x = make(name), inputs()
    clean = np.ones((4, 5), bool)
    clean[1, 2] = clean[3, 0] = False

    @jax.jit
    def run(layer, x):
        def loss(layer, x):
            y, load = layer(x, jnp.asarray(clean))
            return jnp.sum(y * jnp.cos(inputs()), where=clean[..., None]), (y, load)

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(layer, x)

    (gradients, (y, load)), (wanted, (wanted_y, _)) = run(layer, jnp.where(clean[..., None], x, poison)), run(layer, x)
    np.testing.assert_allclose(np.asarray(y)[clean], np.asarray(wanted_y)[clean], atol=1e-6)
    assert np.isfinite(poison) or np.isnan(np.asarray(y)[~clean]).all()
    for one, other in zip(jax.tree.leaves(gradients), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    assert load.sum() == 18 * VARIANTS[name]["num_experts_per_token"]


def test_only_what_counts_is_in_the_load():
    layer, x = make("kimi"), inputs(8)
    counted = jax.random.bernoulli(jax.random.key(2), 0.6, (8, 5))
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))

    @jax.jit
    def on_mesh(layer, x, counted):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return layer(x, counted)

    whole, batch = NamedSharding(mesh, P()), NamedSharding(mesh, P(("data", "fsdp")))
    y, load = on_mesh(*(jax.device_put(a, s) for a, s in ((layer, whole), (x, batch), (counted, batch))))
    chosen, _ = layer.route(x)
    np.testing.assert_array_equal(load, np.bincount(np.asarray(chosen)[np.asarray(counted)].ravel(), minlength=EXPERTS))
    np.testing.assert_allclose(y, layer(x)[0], atol=1e-5)  # the others are mapped all the same
