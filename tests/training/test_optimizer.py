"""Schedules at their corners, the weight-decay mask leaf by leaf, and AdamW against its formula."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from delta_jax.models import MixerSpec, ModelConfig
from delta_jax.models.config import ExpertsConfig
from delta_jax.parallel import path_string
from delta_jax.training import (
    OptimizerConfig,
    TrainConfig,
    learning_rate_schedule,
    make_optimizer,
    muon_dimension_numbers,
    set_up,
    weight_decay_mask,
)
from delta_jax.training.state import abstract_model

EVERY_STEP = jnp.arange(1001)  # one shape for all schedules, which are compiled op by op


def _rates(config: OptimizerConfig, steps: int) -> np.ndarray:
    return np.asarray(learning_rate_schedule(config, steps)(EVERY_STEP))[: steps + 1]


def test_cosine_at_its_corners() -> None:
    config = OptimizerConfig(learning_rate=2.0, warmup_steps=10, initial_ratio=0.1, final_ratio=0.2)
    rates = _rates(config, 110)
    np.testing.assert_allclose(rates[[0, 5, 10, 60, 110]], [0.2, 1.1, 2.0, 1.2, 0.4], rtol=1e-6)
    assert np.all(np.diff(rates[:11]) > 0)
    assert np.all(np.diff(rates[10:]) < 0)


def test_warmup_stable_decay_at_its_corners() -> None:
    config = OptimizerConfig(
        learning_rate=2.0,
        schedule="wsd",
        warmup_steps=10,
        decay_fraction=0.2,
        initial_ratio=0.0,
        final_ratio=0.1,
    )
    rates = _rates(config, 100)
    np.testing.assert_allclose(rates[[0, 5, 10, 50, 80, 90, 100]], [0, 1, 2, 2, 2, 1.1, 0.2], rtol=1e-6)
    assert np.all(rates[10:81] == rates[10])


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_schedules_without_warmup_and_without_decay(schedule: str) -> None:
    config = OptimizerConfig(learning_rate=1.0, schedule=schedule, final_ratio=0.0)  # type: ignore[arg-type]
    np.testing.assert_allclose(_rates(config, 10)[[0, 10]], [1.0, 0.0], atol=1e-7)
    all_warm = OptimizerConfig(learning_rate=1.0, schedule=schedule, warmup_steps=4)  # type: ignore[arg-type]
    np.testing.assert_allclose(_rates(all_warm, 4)[:4], [0, 0.25, 0.5, 0.75], rtol=1e-6)


# Warm-up steps of so many in all, first and last ratio, share of the decay.
CORNERS = [
    (warmup, steps, initial, final, fraction)
    for warmup, steps in ((0, 1), (0, 7), (7, 7), (10, 110), (37, 1000))
    for initial, final, fraction in ((0.0, 0.0, 0.2), (0.1, 0.1, 1.0), (1 / 3, 0.37, 0.0), (1.0, 1.0, 0.5))
]


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_schedules_against_float64_at_every_step(schedule: Literal["cosine", "wsd"]) -> None:
    """To two units in the last place of the peak, and first, highest and last rate exactly."""
    for warmup, steps, initial, final, fraction in CORNERS:
        config = OptimizerConfig(
            learning_rate=3e-4,
            schedule=schedule,
            warmup_steps=warmup,
            initial_ratio=initial,
            final_ratio=final,
            decay_fraction=fraction,
        )
        decay = steps - warmup if schedule == "cosine" else min(round(fraction * steps), steps - warmup)
        step = np.arange(steps + 1.0)
        gone = np.clip((step - (steps - decay)) / max(decay, 1), 0.0, 1.0)
        left = (1 + np.cos(np.pi * gone)) / 2 if schedule == "cosine" else 1 - gone
        rising = initial + (1 - initial) * step / max(warmup, 1)
        wanted = 3e-4 * np.where(step < warmup, rising, final + (1 - final) * left)
        rates = _rates(config, steps)
        assert rates.dtype == np.float32
        assert np.abs(rates - wanted).max() < 2.5 * np.spacing(np.float32(3e-4)), config
        peak, one = np.float32(3e-4), np.float32(1 - final) + np.float32(final)
        ends = [np.float32(initial) if warmup else one, one, np.float32(final) if decay else one]
        np.testing.assert_array_equal(rates[[0, warmup, steps]], [peak * end for end in ends])
        if schedule == "wsd":  # after the warm-up every bit is the formula's
            exact = 1 - jnp.clip((EVERY_STEP.astype(jnp.float32) - (steps - decay)) / max(decay, 1), 0.0, 1.0)
            exact = 3e-4 * (final + (1 - final) * exact)
            np.testing.assert_array_equal(rates[warmup:], np.asarray(exact)[warmup : steps + 1])


def test_impossible_optimizers() -> None:
    for keywords, name in [
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"beta2": 1.0}, "beta2"),
        ({"clip_norm": 0.0}, "clip_norm"),
        ({"final_ratio": 2.0}, "final_ratio"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"weight_decay": -0.1}, "weight_decay"),
    ]:
        with pytest.raises(ValueError, match=name):
            OptimizerConfig(**keywords)  # type: ignore[arg-type]


def test_the_mask_of_both_mixers_is_exactly_the_matrices() -> None:
    options: tuple[tuple[str, object], ...] = (("num_heads", 2), ("head_dim", 8), ("use_output_gate", True))
    pattern = tuple(MixerSpec(mixer=mixer, options=options) for mixer in ("delta_net", "gated_delta_net"))
    config = ModelConfig(vocab_size=64, hidden_size=16, num_layers=2, intermediate_size=32, pattern=pattern)
    mask = weight_decay_mask(abstract_model(config)[1])
    decayed = {path_string(path) for path, decays in jax.tree_util.tree_leaves_with_path(mask) if decays}
    rest = {path_string(path) for path, decays in jax.tree_util.tree_leaves_with_path(mask) if not decays}
    projections, convolutions = (
        ("q_proj", "k_proj", "v_proj", "b_proj", "g_proj", "o_proj"),
        ("q_conv", "k_conv", "v_conv"),
    )
    expected = {"embed/embedding", "lm_head/kernel", "blocks/1/mixer/a_proj/kernel"}
    for block in ("blocks/0", "blocks/1"):
        expected |= {f"{block}/mixer/{name}/kernel" for name in projections + convolutions}
        expected |= {f"{block}/mlp/{name}/kernel" for name in ("gate_proj", "up_proj", "down_proj")}
    assert decayed == expected
    assert rest == {"final_norm/scale", "blocks/1/mixer/A_log", "blocks/1/mixer/dt_bias"} | {
        f"blocks/{index}/{name}/scale" for index in (0, 1) for name in ("mixer_norm", "mlp_norm", "mixer/o_norm")
    }


def test_a_parameter_of_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="blocks/0/strange"):
        weight_decay_mask({"blocks": {0: {"strange": jnp.zeros(3)}}})


def test_two_updates_against_the_formula_in_float64() -> None:
    config = OptimizerConfig(learning_rate=0.1, warmup_steps=2, initial_ratio=0.5, weight_decay=0.3, clip_norm=1.0)
    optimizer = make_optimizer(config, 10)
    parameters = {"proj": {"kernel": jnp.asarray([[1.0, -2.0]])}, "norm": {"scale": jnp.asarray([3.0])}}
    gradients = [
        {
            "proj": {"kernel": jnp.asarray([[3.0, 4.0]])},
            "norm": {"scale": jnp.asarray([12.0])},
        },  # norm 13: clipped
        {"proj": {"kernel": jnp.asarray([[0.1, -0.2]])}, "norm": {"scale": jnp.asarray([0.3])}},
    ]
    state = optimizer.init(parameters)
    for gradient in gradients:
        updates, state = optimizer.update(gradient, state, parameters)
        parameters = jax.tree.map(jnp.add, parameters, updates)

    x, m, v = np.array([1.0, -2.0, 3.0]), np.zeros(3), np.zeros(3)
    for step, raw in enumerate([np.array([3.0, 4.0, 12.0]) / 13, np.array([0.1, -0.2, 0.3])]):
        rate = 0.1 * (0.5 + 0.5 * step / 2)
        m, v = 0.9 * m + 0.1 * raw, 0.95 * v + 0.05 * raw**2
        direction = (m / (1 - 0.9 ** (step + 1))) / (np.sqrt(v / (1 - 0.95 ** (step + 1))) + 1e-8)
        x = x - rate * (direction + 0.3 * x * np.array([1, 1, 0]))
    actual = np.concatenate([np.asarray(parameters["proj"]["kernel"])[0], np.asarray(parameters["norm"]["scale"])])
    np.testing.assert_allclose(actual, x, rtol=2e-6)


def test_one_structure_of_state_with_clipping_and_without() -> None:
    parameters = {"proj": {"kernel": jnp.ones((2, 2))}}
    states = [make_optimizer(OptimizerConfig(clip_norm=norm), 10).init(parameters) for norm in (1.0, None)]
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])


EXPERTS = ModelConfig(
    vocab_size=16,
    hidden_size=8,
    num_layers=3,
    intermediate_size=8,
    pattern=(MixerSpec(mixer="gated_delta_net", options=(("num_heads", 2), ("head_dim", 4))),),
    experts=ExpertsConfig(expert_size=8, num_experts=2, num_experts_per_token=1),
    dense_layers=(0,),
)


def test_muon_takes_the_matrices_of_blocks_and_nothing_else() -> None:
    """Norms, convolutions, decays, biases, embedding and head are AdamW's; the last two axes are a matrix's."""
    _, parameters = abstract_model(EXPERTS)
    numbers = jax.tree_util.tree_leaves_with_path(
        muon_dimension_numbers(parameters), is_leaf=lambda node: isinstance(node, optax.contrib.MuonDimensionNumbers)
    )
    taken = {path_string(path): (found.reduction_axis, found.output_axis) for path, found in numbers}
    projections = [f"mixer/{name}_proj/kernel" for name in "abgkoqv"]
    dense = [f"mlp/{name}_proj/kernel" for name in ("gate", "up", "down")]
    experts = [f"mlp/experts/{name}_proj" for name in ("gate", "up", "down")]
    expected = {f"blocks/0/{name}": (1, 2) for name in projections + dense}
    expected |= {f"blocks/1/{name}": (1, 2) for name in [*projections, "mlp/router/kernel"]}
    assert taken == expected | {f"blocks/1/{name}": (2, 3) for name in experts}


def test_muon_of_stacked_layers_is_muon_of_each_layer() -> None:
    """Every kernel of every layer, and every expert's, moves as it does alone; all else as by AdamW."""
    shapes = {
        "blocks": {
            0: {
                "mixer": {
                    "q_proj": {"kernel": (2, 4, 6)},
                    "q_conv": {"kernel": (2, 4, 6)},
                    "o_norm": {"scale": (2, 4)},
                },
                "mlp": {"experts": {"up_proj": (2, 3, 6, 4)}},
            }
        },
        "embed": {"embedding": (8, 4)},
    }
    draw = np.random.default_rng(0)
    parameters, *gradients = (
        jax.tree.map(
            lambda shape: draw.standard_normal(shape, np.float32), shapes, is_leaf=lambda x: isinstance(x, tuple)
        )
        for _ in range(3)
    )

    def alone(tree: Any) -> dict[str, np.ndarray]:
        """Matrices one by one; of all else vectors, which Muon leaves to AdamW by itself."""
        mixer = tree["blocks"][0]["mixer"]
        matrices = [*mixer["q_proj"]["kernel"], *tree["blocks"][0]["mlp"]["experts"]["up_proj"].reshape(-1, 6, 4)]
        vectors = [mixer["q_conv"]["kernel"], mixer["o_norm"]["scale"], tree["embed"]["embedding"]]
        return {f"{index:02}": leaf for index, leaf in enumerate([*matrices, *(leaf.reshape(-1) for leaf in vectors)])}

    moved = alone(_two_updates(parameters, gradients, {"muon_weight_dimension_numbers": muon_dimension_numbers}))
    wanted = _two_updates(alone(parameters), [alone(gradient) for gradient in gradients], {})
    assert [leaf.ndim for leaf in wanted.values()] == [2] * 8 + [1] * 3
    for name, leaf in wanted.items():
        np.testing.assert_allclose(moved[name], leaf, rtol=2e-5, atol=2e-6, err_msg=name)


def _two_updates(parameters: Any, gradients: list[Any], options: dict[str, Any]) -> Any:
    optimizer = optax.contrib.muon(0.1, **options)

    @jax.jit
    def update(parameters: Any, gradients: list[Any]) -> Any:
        state = optimizer.init(parameters)
        for gradient in gradients:
            with jax.numpy_dtype_promotion("standard"):
                updates, state = optimizer.update(gradient, state, parameters)
            parameters = optax.apply_updates(parameters, updates)
        return parameters

    return update(parameters, gradients)


def test_muon_that_takes_stacked_vectors_for_matrices_is_refused() -> None:
    config = TrainConfig(model=EXPERTS, steps=10, batch_size=2, sequence_length=8)
    with pytest.raises(
        ValueError, match=r"^muon takes blocks/0/\S+ for a matrix, but it holds vectors of stacked layers: give"
    ):
        set_up(config, jax.devices()[:1], optimizer=optax.contrib.muon(0.1))
    muon = optax.contrib.muon(0.1, muon_weight_dimension_numbers=muon_dimension_numbers)
    moments = (
        set_up(config, jax.devices()[:1], optimizer=muon)
        .state.optimizer.inner_states["muon"]
        .inner_state[0]
        .mu["blocks"][1]["mlp"]["experts"]
    )
    assert moments["up_proj"].shape == (2, 2, 8, 8)
