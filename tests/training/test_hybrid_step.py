"""The train step of a stack with several kinds of mixers and with experts."""

import functools

import jax
import numpy as np
import pytest

from delta_jax.models import ExpertsConfig, LayerOverride, MixerSpec, ModelConfig
from delta_jax.parallel import MeshConfig, path_string, shard_batch
from delta_jax.training import OptimizerConfig, TrainConfig, set_up

OPTIMIZER = OptimizerConfig(learning_rate=3e-3, weight_decay=0.1)
RATE, ONE = 0.01, MeshConfig()
LATENT = {"num_heads": 2, "kv_lora_rank": 8, "qk_nope_head_dim": 6, "qk_rope_head_dim": 2, "v_head_dim": 8}
LATENT |= {"rope_theta": 50.0, "rope_interleaved": True, "use_head_gate": True, "q_lora_rank": 4}
GATED = {"num_heads": 4, "num_kv_heads": 2, "window": 5, "use_qk_norm": True, "use_output_gate": True}
GATED |= {"qk_norm_width": "all", "use_qkv_bias": True, "use_output_bias": True}
MODEL = ModelConfig(
    vocab_size=32,
    hidden_size=16,
    num_layers=2,
    intermediate_size=24,
    dtype="float32",
    initializer_std=0.2,
    pattern=(MixerSpec(mixer="attention", options=tuple(GATED.items()), norm_placement="post"),),
    layer_overrides=(LayerOverride(layers=(1,), mixer="latent_attention", options=tuple(LATENT.items())),),
    zero_centered_norms=True,
    experts=ExpertsConfig(
        expert_size=6,
        num_experts=8,
        num_experts_per_token=2,
        shared_expert_size=6,
        num_expert_groups=4,
        num_groups_per_token=2,
        balance_rate=RATE,
    ),
    dense_layers=(0,),
)


def batches(micro, tail=0):
    """The last five targets of a row do not count: masked in the first batch, negative in the second.

    `tail` is added to the inputs there, which come after all that counts.
    """
    random = np.random.default_rng(0)
    shape, result = (micro, 8 // micro, 12), []
    for number in range(2):
        ids, mask = random.integers(0, 32, (2, 8, 12)).astype(np.int32), np.ones((8, 12), np.float32)
        ids[0, :, -5:] = (ids[0, :, -5:] + tail) % 32
        if number == 0:
            mask[:, -5:] = 0.0
        else:
            ids[1, :, -5:] = -100
        ids = ids.reshape(2, *shape)
        segments = np.broadcast_to(1 + (np.arange(12) >= 7), shape).astype(np.int32)
        result.append({"inputs": ids[0], "targets": ids[1], "segment_ids": segments, "mask": mask.reshape(shape)})
    return result


def beginning(state):
    """The state at step 0, filled by numpy: compiling the initialisation takes longer than all the rest."""
    draw = np.random.default_rng(1)

    def fill(path, leaf):
        name = path_string(path)
        if not name.startswith("parameters") or "bias" in name:
            return np.zeros(leaf.shape, leaf.dtype)
        return np.asarray(("scale" in name) + 0.2 * draw.standard_normal(leaf.shape), leaf.dtype)

    filled = jax.tree_util.tree_map_with_path(fill, state)
    return jax.device_put(filled, jax.tree.map(lambda leaf: leaf.sharding, state))


@functools.cache
def made(mesh, devices):
    config = TrainConfig(model=MODEL, steps=10, batch_size=8, sequence_length=12, optimizer=OPTIMIZER, mesh=mesh)
    return set_up(config, jax.devices()[:devices])


@functools.cache
def run(micro=1, mesh=ONE, devices=1, tail=0):
    """Losses and all states of two steps."""
    setup = made(mesh, devices)
    state = beginning(setup.state)
    losses, states = [], [jax.device_get(state.parameters)]
    for batch in batches(micro, tail):
        state, metrics = setup.train_step(state, shard_batch(batch, setup.mesh))
        losses.append(float(metrics["loss"]))
        states.append(jax.device_get(state.parameters))
    return losses, states


def biases(parameters):
    flat = jax.tree_util.tree_leaves_with_path(parameters)
    return np.concatenate([leaf for path, leaf in flat if path_string(path).endswith("expert_bias")])


def test_every_parameter_moves_and_the_biases_by_their_rate():
    _, (first, second, third) = run()
    for (path, one), other in zip(jax.tree_util.tree_leaves_with_path(first), jax.tree.leaves(third), strict=True):
        assert np.abs(one - other).max() > 1e-5, path_string(path)
    assert biases(first).shape == (1, 8)  # the first layer is dense
    np.testing.assert_array_equal(biases(first), 0)
    moved = biases(second) / RATE
    np.testing.assert_allclose(moved, np.sign(moved), atol=1e-6)
    assert (np.abs(moved).sum(axis=1) > 4).all()
    assert (biases(third) != biases(second)).any()


@pytest.mark.parametrize(
    "changes", [{"micro": 4}, {"mesh": MeshConfig(data=2, fsdp=2, tensor=2), "devices": 8}], ids=["micro", "mesh"]
)
def test_micro_batches_and_devices_change_nothing(changes):
    (losses, (_, second, _)), (others, (_, other, _)) = run(), run(**changes)
    np.testing.assert_allclose(others, losses, rtol=2e-5)
    np.testing.assert_array_equal(biases(other), biases(second))


def test_tokens_whose_targets_do_not_count_move_nothing():
    """Not even the biases, which see no loss but the experts' loads."""
    (losses, states), (others, changed) = run(), run(tail=7)
    assert losses == others
    jax.tree.map(np.testing.assert_array_equal, states, changed)
