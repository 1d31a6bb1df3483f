"""The train step: its loss, accumulation over micro-batches, and the same numbers on any mesh."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from delta_jax.evaluation import evaluate
from delta_jax.models import MixerSpec, ModelConfig
from delta_jax.models.loss import token_nats
from delta_jax.parallel import MeshConfig, path_string, shard_batch
from delta_jax.training import OptimizerConfig, Setup, TrainConfig, TrainState, set_up
from delta_jax.training.state import merge_model

OPTIMIZER = OptimizerConfig(learning_rate=3e-3, warmup_steps=2, weight_decay=0.1)
ONE, EIGHT = (MeshConfig(), 1), (MeshConfig(data=2, fsdp=2, tensor=2), 8)


def _model(mixer: str = "gated_delta_net", implementation: str | None = "recurrent", **changes: object) -> ModelConfig:
    options: tuple[tuple[str, object], ...] = (
        ("num_heads", 2),
        ("head_dim", 8),
        ("implementation", implementation),
    )
    pattern = (MixerSpec(mixer=mixer, options=options),)
    keywords = {
        "vocab_size": 32,
        "hidden_size": 16,
        "num_layers": 2,
        "intermediate_size": 32,
        "dtype": "float32",
    } | changes
    return ModelConfig(pattern=pattern, **keywords)  # type: ignore[arg-type]


def _batches(count: int, micro: int = 1, batch: int = 8, time: int = 24) -> list[dict[str, np.ndarray]]:
    """Random batches with two segments a row and a different number of tokens in every row."""
    random = np.random.default_rng(0)
    shape = (micro, batch // micro, time)
    result = []
    for _ in range(count):
        mask = (random.random(shape) < random.random((*shape[:2], 1))).astype(np.float32)
        ids = random.integers(0, 32, (2, *shape)).astype(np.int32)
        segments = np.broadcast_to(1 + (np.arange(time) >= 10), shape).astype(np.int32)
        result.append({"inputs": ids[0], "targets": ids[1], "segment_ids": segments, "mask": mask})
    return result


def _set_up(model: ModelConfig, mesh: MeshConfig, devices: int, *, seed: int = 3) -> Setup:
    config = TrainConfig(
        model=model, steps=10, batch_size=8, sequence_length=24, optimizer=OPTIMIZER, mesh=mesh, seed=seed
    )
    return set_up(config, jax.devices()[:devices])


def _run(
    model: ModelConfig, batches: list[dict[str, np.ndarray]], mesh: MeshConfig, devices: int
) -> tuple[list[dict[str, float]], TrainState]:
    run = _set_up(model, mesh, devices)
    state = run.initial_state()
    metrics = []
    for batch in batches:
        state, values = run.train_step(state, shard_batch(batch, run.mesh))
        metrics.append({name: float(value) for name, value in values.items()})
    return metrics, state


def test_cross_entropy_against_float64() -> None:
    random = np.random.default_rng(1)
    logits = (5 * random.standard_normal((2, 7, 11))).astype(np.float32)
    targets = random.integers(0, 11, (2, 7)).astype(np.int32)
    mask = random.integers(0, 2, (2, 7)).astype(np.float32)
    wide = logits.astype(np.float64)
    expected = np.log(np.exp(wide).sum(-1)) - np.take_along_axis(wide, targets[..., None], -1)[..., 0]
    actual = jnp.sum(token_nats(jnp.asarray(logits), jnp.asarray(targets)) * jnp.asarray(mask))
    np.testing.assert_allclose(float(actual), (expected * mask).sum(), rtol=1e-6)


@pytest.mark.parametrize("mixer", [pytest.param("delta_net", marks=pytest.mark.slow), "gated_delta_net"])
def test_eight_devices_train_as_one(mixer: str) -> None:
    model = _model(mixer, "xla")
    batches = _batches(4)
    one, state_one = _run(model, batches, *ONE)
    eight, state_eight = _run(model, batches, *EIGHT)
    for left, right in zip(one, eight, strict=True):
        np.testing.assert_allclose(right["loss"], left["loss"], rtol=2e-6)
        np.testing.assert_allclose(right["gradient_norm"], left["gradient_norm"], rtol=2e-5)
        assert (left["tokens"], left["learning_rate"]) == (right["tokens"], right["learning_rate"])
    kernel = state_eight.parameters["blocks"][0]["mixer"]["q_proj"]["kernel"]
    assert kernel.sharding.spec == P(None, "fsdp", "tensor")
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(2, 8, 8)}
    assert state_one.parameters["blocks"][0]["mixer"]["q_proj"]["kernel"].shape == (2, 16, 16)


def test_optimizer_state_is_cut_as_its_parameters() -> None:
    state = _set_up(_model(), *EIGHT).initial_state()
    cut = {path_string(path): leaf.sharding for path, leaf in jax.tree_util.tree_leaves_with_path(state.parameters)}
    moments = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.optimizer):
        for name, sharding in cut.items():
            if path_string(path).endswith(name) and leaf.ndim:
                assert leaf.sharding == sharding, path_string(path)
                moments += 1
    assert moments == 2 * len(cut)


def test_initial_parameters_do_not_depend_on_the_mesh() -> None:
    states = [_set_up(_model(), *where, seed=5).initial_state() for where in (ONE, EIGHT)]
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), *states)


def test_micro_batches_add_up_to_the_batch() -> None:
    whole = _batches(3)
    parts = [{name: array.reshape(4, 2, -1) for name, array in batch.items()} for batch in whole]
    assert len({float(row.sum()) for row in parts[0]["mask"]}) > 1  # the weights of the micro-batches differ
    big, big_state = _run(_model(), whole, *ONE)
    small, small_state = _run(_model(), parts, *ONE)
    for left, right in zip(big, small, strict=True):
        for name in left:
            np.testing.assert_allclose(right[name], left[name], rtol=5e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5),
        big_state.parameters,
        small_state.parameters,
    )


def test_a_batch_without_targets_changes_no_loss_into_nan() -> None:
    batch = _batches(1)[0]
    metrics, _ = _run(_model(), [batch | {"mask": np.zeros_like(batch["mask"])}], *ONE)
    assert (metrics[0]["loss"], metrics[0]["gradient_norm"], metrics[0]["tokens"]) == (0.0, 0.0, 0.0)


def test_the_old_state_is_donated() -> None:
    run = _set_up(_model(), *ONE)
    state = run.initial_state()
    run.train_step(state, shard_batch(_batches(1)[0], run.mesh))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.parameters))


@pytest.mark.parametrize("where", [ONE, EIGHT], ids=["one", "eight"])
def test_evaluation_sums_agree_with_the_training_loss(where: tuple[MeshConfig, int]) -> None:
    batch, run = _batches(1)[0], _set_up(_model(), *where)
    state = run.initial_state()
    nats, tokens = run.evaluation_step(state.parameters, shard_batch(batch, run.mesh))
    assert nats.shape == tokens.shape == (8,) and nats.sharding.is_fully_replicated
    np.testing.assert_array_equal(tokens, batch["mask"][0].sum(axis=-1))
    model: Any = merge_model(run.structure, jax.device_get(state.parameters))
    wanted = evaluate(model, [{name: array[0] for name, array in batch.items()}], bytes=1)
    np.testing.assert_allclose(np.asarray(nats, np.float64).sum() / wanted.tokens, wanted.loss, rtol=1e-6)
    _, metrics = run.train_step(state, shard_batch(batch, run.mesh))
    np.testing.assert_allclose(wanted.loss, metrics["loss"], rtol=2e-6)


def test_bfloat16_compute_keeps_float32_parameters_and_a_close_loss() -> None:
    exact, _ = _run(_model(), _batches(3), *ONE)
    rough, state = _run(_model(dtype="bfloat16", remat="block"), _batches(3), *ONE)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.parameters)} == {jnp.dtype("float32")}
    np.testing.assert_allclose([m["loss"] for m in rough], [m["loss"] for m in exact], rtol=5e-3)


@pytest.mark.parametrize("implementation", [None, "recurrent"])
def test_the_step_sets_its_mesh_so_that_the_op_is_cut_over_it(implementation: str | None) -> None:
    run = _set_up(_model(implementation=implementation), *EIGHT)
    train = run.train_step.trace(run.state, run.batch)
    evaluation = run.evaluation_step.trace(run.state.parameters, run.evaluation_batch)
    assert all("shard_map" in str(traced.jaxpr) for traced in (train, evaluation))


def test_a_target_that_does_not_count_is_selected_away() -> None:
    """Negative ones, whatever the mask says, and masked ones, whatever they are: no nats, no gradient, no tokens."""
    random = np.random.default_rng(1)
    logits = jnp.asarray(5 * random.standard_normal((2, 7, 11)), jnp.float32)
    targets = random.integers(0, 11, (2, 7)).astype(np.int32)
    hidden = random.random((2, 7)) < 0.5

    def total(logits: jax.Array, targets: np.ndarray, counted: np.ndarray | None = None) -> jax.Array:
        return jnp.sum(token_nats(logits, jnp.asarray(targets), None if counted is None else jnp.asarray(counted)))

    whole = token_nats(logits, jnp.asarray(targets))
    wanted = jax.grad(lambda x: jnp.sum(token_nats(x, jnp.asarray(targets)), where=~hidden))(logits)
    poisoned = jnp.where(hidden[..., None], jnp.nan, logits)
    for arguments in ((np.where(hidden, -100, targets),), (np.where(hidden, -7, targets), ~hidden), (targets, ~hidden)):
        value, gradient = jax.value_and_grad(total)(poisoned, *arguments)
        np.testing.assert_allclose(value, np.sum(whole, where=~hidden), rtol=1e-6)
        np.testing.assert_allclose(gradient, wanted, atol=1e-6)


def test_negative_targets_train_as_masked_ones() -> None:
    batch = _batches(1)[0]
    hidden = batch["mask"] == 0
    negative = {"targets": np.where(hidden, -100, batch["targets"]), "mask": np.ones_like(batch["mask"])}
    one, state = _run(_model(), [batch], *ONE)
    other, same = _run(_model(), [batch | negative], *ONE)
    assert one == other
    jax.tree.map(np.testing.assert_array_equal, state.parameters, same.parameters)
