"""Whole models whose sequences are cut over devices train as on one."""

import jax
import numpy as np
import pytest

from delta_jax.models import ExpertsConfig, MixerSpec, ModelConfig
from delta_jax.parallel import MeshConfig, shard_batch
from delta_jax.training import TrainConfig, set_up

HEADS = ("num_heads", 4), ("head_dim", 8)
LATENT = ("num_heads", 4), ("kv_lora_rank", 8), ("qk_nope_head_dim", 8), ("qk_rope_head_dim", 4), ("v_head_dim", 8)
PATTERNS = {
    "gated_delta_net, window": (("gated_delta_net", HEADS), ("attention", (("num_heads", 4), ("window", 11)))),
    "kimi_delta_attention, latent attention": (("kimi_delta_attention", HEADS), ("latent_attention", LATENT)),
    "delta_product, mamba2": (("delta_product", (*HEADS, ("num_householder", 2))), ("mamba2", HEADS)),
}
TIME = 64


def config_of(pattern, mesh, time=TIME):
    mixers = tuple(MixerSpec(mixer=name, options=options) for name, options in PATTERNS[pattern])
    experts = ExpertsConfig(num_experts=4, num_experts_per_token=2, expert_size=16) if "kimi" in pattern else None
    model = ModelConfig(
        vocab_size=32,
        hidden_size=32,
        num_layers=2,
        pattern=mixers,
        intermediate_size=32,
        experts=experts,
        dtype="float32",
    )
    return TrainConfig(model=model, steps=2, batch_size=4, sequence_length=time, mesh=mesh)


def two_steps(pattern, mesh, devices):
    """Losses and norms of gradients; segments end where no piece does."""
    setup = set_up(config_of(pattern, mesh), jax.devices()[:devices])
    random = np.random.default_rng(0)
    tokens = random.integers(0, 32, (1, 4, TIME + 1)).astype(np.int32)
    ids = np.sort(random.integers(0, 4, (1, 4, TIME)), -1).astype(np.int32)
    mask = np.ones((1, 4, TIME), np.float32)
    batch = {"inputs": tokens[..., :-1], "targets": tokens[..., 1:], "segment_ids": ids, "mask": mask}
    state, found = setup.initial_state(), []
    for _ in range(2):
        state, metrics = setup.train_step(state, shard_batch(batch, setup.mesh))
        found += [float(metrics["loss"]), float(metrics["gradient_norm"])]
    return np.array(found)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", PATTERNS)
def test_models_train_as_on_one_device(pattern):
    alone = two_steps(pattern, MeshConfig(), 1)
    for mesh in (MeshConfig(data=1, sequence=8), MeshConfig(data=1, fsdp=2, sequence=2, tensor=2)):
        np.testing.assert_allclose(two_steps(pattern, mesh, 8), alone, rtol=2e-6)


def test_tokens_that_do_not_divide_are_named():
    config = config_of("gated_delta_net, window", MeshConfig(data=1, sequence=8), time=60)
    with pytest.raises(
        ValueError, match=r"sequence_length is 60: wanted a multiple of the 8 parts .* \(mesh.sequence\)"
    ):
        set_up(config, jax.devices())
