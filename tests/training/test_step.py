"""The train step: its loss, accumulation over micro-batches, and the same numbers on any mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from delta_jax.models import MixerSpec, ModelConfig
from delta_jax.models.loss import token_nats
from delta_jax.parallel import MeshConfig, make_mesh, path_string, shard_batch
from delta_jax.training import (
    OptimizerConfig,
    TrainState,
    abstract_state,
    initial_state,
    learning_rate_schedule,
    make_evaluation_step,
    make_optimizer,
    make_train_step,
)

OPTIMIZER = OptimizerConfig(learning_rate=3e-3, warmup_steps=2, weight_decay=0.1)


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


def _run(
    model: ModelConfig, batches: list[dict[str, np.ndarray]], mesh: MeshConfig, devices: int
) -> tuple[list[dict[str, float]], TrainState]:
    grid = make_mesh(mesh, jax.devices()[:devices])
    optimizer = make_optimizer(OPTIMIZER, 10)
    step = make_train_step(model, optimizer, learning_rate_schedule(OPTIMIZER, 10), grid)
    state = initial_state(model, optimizer, grid, seed=3)
    metrics = []
    for batch in batches:
        state, values = step(state, shard_batch(batch, grid))
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


@pytest.mark.parametrize("mixer", ["delta_net", "gated_delta_net"])
def test_eight_devices_train_as_one(mixer: str) -> None:
    model = _model(mixer, "xla")
    batches = _batches(4)
    one, state_one = _run(model, batches, MeshConfig(), 1)
    eight, state_eight = _run(model, batches, MeshConfig(data=2, fsdp=2, tensor=2), 8)
    for left, right in zip(one, eight, strict=True):
        np.testing.assert_allclose(right["loss"], left["loss"], rtol=2e-6)
        np.testing.assert_allclose(right["gradient_norm"], left["gradient_norm"], rtol=2e-5)
        assert (left["tokens"], left["learning_rate"]) == (right["tokens"], right["learning_rate"])
    kernel = state_eight.parameters["blocks"][0]["mixer"]["q_proj"]["kernel"]
    assert kernel.sharding.spec == P(None, "fsdp", "tensor")
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(2, 8, 8)}
    assert state_one.parameters["blocks"][0]["mixer"]["q_proj"]["kernel"].shape == (2, 16, 16)


def test_optimizer_state_is_cut_as_its_parameters() -> None:
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    state = initial_state(_model(), make_optimizer(OPTIMIZER, 10), mesh, seed=0)
    cut = {path_string(path): leaf.sharding for path, leaf in jax.tree_util.tree_leaves_with_path(state.parameters)}
    moments = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.optimizer):
        for name, sharding in cut.items():
            if path_string(path).endswith(name) and leaf.ndim:
                assert leaf.sharding == sharding, path_string(path)
                moments += 1
    assert moments == 2 * len(cut)


def test_initial_parameters_do_not_depend_on_the_mesh() -> None:
    optimizer = make_optimizer(OPTIMIZER, 10)
    states = [
        initial_state(_model(), optimizer, make_mesh(mesh, jax.devices()[:count]), seed=5)
        for mesh, count in ((MeshConfig(), 1), (MeshConfig(data=2, fsdp=2, tensor=2), 8))
    ]
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), *states)


def test_micro_batches_add_up_to_the_batch() -> None:
    whole = _batches(3)
    parts = [{name: array.reshape(4, 2, -1) for name, array in batch.items()} for batch in whole]
    assert len({float(row.sum()) for row in parts[0]["mask"]}) > 1  # the weights of the micro-batches differ
    big, big_state = _run(_model(), whole, MeshConfig(), 1)
    small, small_state = _run(_model(), parts, MeshConfig(), 1)
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
    metrics, _ = _run(_model(), [batch | {"mask": np.zeros_like(batch["mask"])}], MeshConfig(), 1)
    assert (metrics[0]["loss"], metrics[0]["gradient_norm"], metrics[0]["tokens"]) == (0.0, 0.0, 0.0)


def test_the_old_state_is_donated() -> None:
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    optimizer = make_optimizer(OPTIMIZER, 10)
    step = make_train_step(_model(), optimizer, learning_rate_schedule(OPTIMIZER, 10), mesh)
    state = initial_state(_model(), optimizer, mesh, seed=0)
    step(state, shard_batch(_batches(1)[0], mesh))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.parameters))


def test_evaluation_sums_agree_with_the_training_loss() -> None:
    model, batch = _model(), _batches(1)[0]
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    state = initial_state(model, make_optimizer(OPTIMIZER, 10), mesh, seed=3)
    nats, tokens = make_evaluation_step(model, mesh)(state.parameters, shard_batch(batch, mesh))
    metrics, _ = _run(model, [batch], MeshConfig(), 1)
    np.testing.assert_allclose(float(nats) / float(tokens), metrics[0]["loss"], rtol=1e-6)


def test_bfloat16_compute_keeps_float32_parameters_and_a_close_loss() -> None:
    exact, _ = _run(_model(), _batches(3), MeshConfig(), 1)
    rough, state = _run(_model(dtype="bfloat16", remat="block"), _batches(3), MeshConfig(), 1)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.parameters)} == {jnp.dtype("float32")}
    np.testing.assert_allclose([m["loss"] for m in rough], [m["loss"] for m in exact], rtol=5e-3)


@pytest.mark.parametrize(("implementation", "cut"), [(None, True), ("xla", False)])
def test_the_step_sets_its_mesh_so_that_kernels_are_cut_over_it(implementation: str | None, cut: bool) -> None:
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    optimizer, model = make_optimizer(OPTIMIZER, 10), _model(implementation=implementation)
    state, batch = abstract_state(model, optimizer, mesh), shard_batch(_batches(1)[0], mesh)
    steps = (
        (make_train_step(model, optimizer, learning_rate_schedule(OPTIMIZER, 10), mesh), state),
        (make_evaluation_step(model, mesh), state.parameters),
    )
    for step, first in steps:
        assert ("shard_map" in str(step.trace(first, batch).jaxpr)) == cut  # type: ignore[attr-defined]


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
    one, state = _run(_model(), [batch], MeshConfig(), 1)
    other, same = _run(_model(), [batch | negative], MeshConfig(), 1)
    assert one == other
    jax.tree.map(np.testing.assert_array_equal, state.parameters, same.parameters)
