"""Groups of parameters, frozen ones, the optimizers beside AdamW, and the moving average: in single steps."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from delta_jax.models import ExpertsConfig, MixerSpec, ModelConfig
from delta_jax.parallel import MeshConfig, path_string, shard_batch
from delta_jax.training import OptimizerConfig, ParameterGroup, Setup, TrainConfig, TrainState, make_optimizer, set_up

MODEL = ModelConfig(
    vocab_size=16,
    hidden_size=8,
    num_layers=2,
    intermediate_size=8,
    dtype="float32",
    pattern=(
        MixerSpec(mixer="delta_net", options=(("num_heads", 2), ("head_dim", 4), ("implementation", "recurrent"))),
    ),
    experts=ExpertsConfig(expert_size=8, num_experts=2, num_experts_per_token=1),
)
MESH = MeshConfig(data=2, fsdp=2, tensor=2)
FROZEN = (ParameterGroup(pattern="^embed/|/mixer/|/expert_bias$", frozen=True),)


def _set_up(optimizer: OptimizerConfig, mesh: MeshConfig | None = None, **changes: Any) -> Setup:
    config = TrainConfig(
        model=MODEL,
        steps=10,
        batch_size=4,
        sequence_length=8,
        optimizer=optimizer,
        mesh=mesh or MeshConfig(),
        **changes,
    )
    return set_up(config, jax.devices()[: 8 if mesh else 1])


def _steps(setup: Setup, count: int = 2) -> tuple[list[TrainState], dict[str, Any]]:
    """The states from the first on, on the host, and the last metrics."""
    draws, states, metrics = np.random.default_rng(0), [], {}
    state = setup.initial_state()
    for _ in range(count):
        states.append(jax.device_get(state))
        ids = draws.integers(0, 16, (2, 1, 4, 8)).astype(np.int32)
        batch = {"inputs": ids[0], "targets": ids[1], "segment_ids": np.ones_like(ids[0])}
        batch["mask"] = np.ones(ids[0].shape, np.float32)
        state, metrics = setup.train_step(state, shard_batch(batch, setup.mesh))
    return [*states, jax.device_get(state)], metrics


def _moved(old: Any, new: Any) -> dict[str, bool]:
    """By path, whether any bit is another."""
    pairs = zip(jax.tree_util.tree_leaves_with_path(old), jax.tree.leaves(new), strict=True)
    return {path_string(path): one.tobytes() != other.tobytes() for (path, one), other in pairs}


def test_frozen_parameters_stay_bit_for_bit_without_a_state() -> None:
    """Experts' biases too, which no gradient moves; and the average of what is frozen."""
    setup = _set_up(OptimizerConfig(learning_rate=0.1, weight_decay=0.1, groups=FROZEN), MESH, ema_decay=0.9)
    states, metrics = _steps(setup)
    for part in ("parameters", "ema"):
        moved = _moved(getattr(states[0], part), getattr(states[-1], part))
        frozen = {path for path in moved if path.startswith("embed/") or "/mixer/" in path or "expert_bias" in path}
        assert len(frozen) > 5 and {path for path, does in moved.items() if not does} == frozen
    moments = [path_string(path) for path, _ in jax.tree_util.tree_leaves_with_path(setup.state.optimizer)]
    assert any("lm_head" in path for path in moments)
    assert not any(name in path for path in moments for name in ("embed", "/mixer/", "expert_bias"))
    assert np.isfinite(metrics["gradient_norm"]) and metrics["gradient_norm"] > 0


def test_what_is_trained_beside_frozen_parameters_moves_as_by_its_own_gradient() -> None:
    """The first step of an optimizer without clipping is the same for the rest, whatever is frozen."""
    optimizers = [OptimizerConfig(clip_norm=None, groups=groups) for groups in (FROZEN, ())]
    (frozen, _), (whole, _) = (_steps(_set_up(optimizer), 1) for optimizer in optimizers)
    moved = _moved(frozen[0].parameters, frozen[1].parameters)
    pairs = zip(moved.items(), jax.tree.leaves(frozen[1].parameters), jax.tree.leaves(whole[1].parameters), strict=True)
    for (path, does), one, other in pairs:
        if does:
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7, err_msg=path)


def test_the_average_follows_the_parameters() -> None:
    states, _ = _steps(_set_up(OptimizerConfig(learning_rate=0.1), ema_decay=0.75), 3)
    average = jax.tree.leaves(states[0].parameters)
    for state in states[1:]:
        average = [0.75 * old + 0.25 * new for old, new in zip(average, jax.tree.leaves(state.parameters), strict=True)]
        for one, other in zip(jax.tree.leaves(state.ema), average, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


PARAMETERS = {
    "blocks": [{"mixer": {"q_proj": {"kernel": 2 * jnp.ones((2, 4, 9))}, "o_norm": {"scale": jnp.ones((2, 4))}}}],
    "lm_head": {"kernel": 3 * jnp.ones((4, 4))},
}


def _updates(steps: int = 1, *, of: Any = None, **options: Any) -> dict[str, np.ndarray]:
    """The last updates of random gradients, by path, by an optimizer of optax or by ours of these options."""
    optimizer = of or make_optimizer(OptimizerConfig(learning_rate=0.5, final_ratio=1.0, **options), 10)
    draws, state = np.random.default_rng(1), optimizer.init(PARAMETERS)
    for _ in range(steps):
        gradients = jax.tree.map(lambda leaf: jnp.asarray(draws.normal(size=leaf.shape), jnp.float32), PARAMETERS)
        updates, state = optimizer.update(gradients, state, PARAMETERS)
    return {path_string(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(updates)}


Q, SCALE, HEAD = "blocks/0/mixer/q_proj/kernel", "blocks/0/mixer/o_norm/scale", "lm_head/kernel"


def test_groups_have_their_own_rate_and_decay_and_the_first_that_matches_counts() -> None:
    plain, bare = _updates(weight_decay=0.1), _updates(weight_decay=0.0)
    groups = (
        ParameterGroup(pattern="lm_head", learning_rate_factor=4.0),
        ParameterGroup(pattern="kernel|scale", weight_decay=0.3),
    )
    grouped = _updates(weight_decay=0.1, groups=groups)
    np.testing.assert_allclose(grouped[HEAD], 4 * plain[HEAD], rtol=1e-6)
    np.testing.assert_allclose(grouped[Q], bare[Q] - 0.5 * 0.3 * 2, rtol=1e-5)
    np.testing.assert_allclose(grouped[SCALE], bare[SCALE], rtol=1e-6)  # a scale never decays


def test_values_are_clipped_before_the_norm() -> None:
    one, other = _updates(name="sgd", clip_value=0.1, clip_norm=None), _updates(name="sgd", clip_norm=None)
    np.testing.assert_allclose(one[HEAD], np.clip(other[HEAD] + 0.015, -0.05, 0.05) - 0.015, atol=1e-6)
    both = _updates(name="sgd", clip_value=0.1, clip_norm=0.5, weight_decay=0.0)
    assert np.sqrt(sum((leaf**2).sum() for leaf in both.values())) == pytest.approx(0.25, rel=1e-5)


def test_lion_and_sgd_are_those_of_optax() -> None:
    theirs = {"lion": optax.lion(0.5, b1=0.8, b2=0.9, weight_decay=0.0), "sgd": optax.sgd(0.5, momentum=0.7)}
    for name, optimizer in theirs.items():
        ours = _updates(2, name=name, beta1=0.8, beta2=0.9, momentum=0.7, clip_norm=None, weight_decay=0.0)
        for path, update in _updates(2, of=optimizer).items():
            np.testing.assert_allclose(ours[path], update, rtol=1e-5, atol=1e-7, err_msg=f"{name} {path}")


def test_muon_moves_matrices_by_orthogonal_updates_of_one_size_and_the_rest_by_adamw() -> None:
    muon, adamw = _updates(name="muon", weight_decay=0.0), _updates(weight_decay=0.0)
    for path in (SCALE, HEAD):
        np.testing.assert_allclose(muon[path], adamw[path], rtol=1e-5)
    for layer in muon[Q]:
        values = np.linalg.svd(layer, compute_uv=False)
        assert (np.abs(values / (0.5 * 0.2 * 3) - 1) < 0.4).all()  # what five iterations leave of one
        assert np.sqrt((layer**2).mean()) == pytest.approx(0.5 * 0.2, rel=0.2)
    assert np.abs(muon[Q][0] - muon[Q][1]).max() > 0.01  # each layer for itself
    decayed = _updates(name="muon", weight_decay=0.1)
    np.testing.assert_allclose(decayed[Q], muon[Q] - 0.5 * 0.1 * 2, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["muon", "lion", "sgd"])
def test_every_optimizer_is_cut_over_a_mesh_without_what_is_frozen(name: str) -> None:
    optimizer = OptimizerConfig(name=name, groups=FROZEN)  # type: ignore[arg-type]
    leaves = jax.tree_util.tree_leaves_with_path(_set_up(optimizer, MESH).state.optimizer)
    paths = {path_string(path): leaf.sharding.spec for path, leaf in leaves}
    assert not any("embed" in path or "/mixer/" in path for path in paths)
    assert all(spec == P("fsdp", "tensor") for path, spec in paths.items() if "lm_head" in path)
    assert all(spec == P(None, None, "fsdp", "tensor") for path, spec in paths.items() if "experts/up_proj" in path)
    assert sum("lm_head" in path for path in paths) == (2 if name == "muon" else 1)


@pytest.mark.slow
def test_muon_trains_on_a_mesh() -> None:
    states, _ = _steps(_set_up(OptimizerConfig(name="muon", learning_rate=0.01), MESH), 1)
    alone, _ = _steps(_set_up(OptimizerConfig(name="muon", learning_rate=0.01)), 1)
    pairs = zip(
        jax.tree_util.tree_leaves_with_path(states[1].parameters), jax.tree.leaves(alone[1].parameters), strict=True
    )
    for (path, one), other in pairs:
        if "router" not in path_string(path):  # one expert a token is weighted by one: the gradient is rounding alone
            np.testing.assert_allclose(one, other, atol=1e-6, err_msg=path_string(path))


def test_a_pattern_that_matches_nothing_is_one_sentence_with_paths() -> None:
    for patterns, said in [
        (["embedx"], r"^optimizer\.groups\.0: the pattern 'embedx' matches no parameter; there are: .*/mixer/"),
        (
            ["embed", "^embed/"],
            r"groups\.1: the pattern '\^embed/' matches only parameters of groups before it: embed/",
        ),
    ]:
        groups = tuple(ParameterGroup(pattern=pattern) for pattern in patterns)
        with pytest.raises(ValueError, match=said):
            _set_up(OptimizerConfig(groups=groups))
    with pytest.raises(ValueError, match="nothing is left to train"):
        _set_up(OptimizerConfig(groups=(ParameterGroup(pattern="", frozen=True),)))


def test_impossible_groups() -> None:
    for keywords, said in [
        ({"pattern": "("}, "is no regular expression"),
        ({"pattern": "a", "learning_rate_factor": 0}, "learning_rate_factor should be positive"),
        ({"pattern": "a", "weight_decay": -1}, "weight_decay should not be negative"),
        ({"pattern": "a", "frozen": True, "weight_decay": 0.1}, "frozen parameters have neither"),
    ]:
        with pytest.raises(ValueError, match=said):
            ParameterGroup(**keywords)  # type: ignore[arg-type]
