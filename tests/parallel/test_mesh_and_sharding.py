"""Meshes, partition rules, and that the models' parameters are all named by one."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from delta_jax.models import MixerSpec, ModelConfig
from delta_jax.parallel import (
    MeshConfig,
    make_mesh,
    parameter_shardings,
    partition_spec,
    path_string,
    shard_batch,
)
from delta_jax.training.state import abstract_model


def test_the_rest_of_the_devices_goes_to_the_axis_of_minus_one() -> None:
    assert dict(make_mesh(MeshConfig()).shape) == {"data": 8, "fsdp": 1, "sequence": 1, "tensor": 1}
    assert dict(make_mesh(MeshConfig(fsdp=2, tensor=2)).shape) == {"data": 2, "fsdp": 2, "sequence": 1, "tensor": 2}
    assert dict(make_mesh(MeshConfig(data=1, fsdp=-1)).shape) == {"data": 1, "fsdp": 8, "sequence": 1, "tensor": 1}
    assert make_mesh(MeshConfig(), jax.devices()[:2]).devices.size == 2


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(data=3), "data=3, fsdp=1, sequence=1, tensor=1 does not fit the 8 cpu"),
        (MeshConfig(data=-1, tensor=3), "data=-1, fsdp=1, sequence=1, tensor=3 does not fit the 8 cpu"),
        (MeshConfig(data=4), "data=4, fsdp=1, sequence=1, tensor=1 does not fit the 8 cpu"),
    ],
)
def test_a_mesh_that_does_not_fit_says_what_is_there(config: MeshConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_mesh(config)


def test_impossible_mesh_sizes() -> None:
    with pytest.raises(ValueError, match="fsdp should be a positive number"):
        MeshConfig(fsdp=0)
    with pytest.raises(ValueError, match="only one mesh axis"):
        MeshConfig(data=-1, fsdp=-1)


def _parameters(mixer: str, tie: bool = False) -> dict[str, jax.ShapeDtypeStruct]:
    options: tuple[tuple[str, object], ...] = (("num_heads", 2), ("head_dim", 8), ("use_output_gate", True))
    config = ModelConfig(
        vocab_size=64, hidden_size=16, num_layers=2, intermediate_size=32, tie_embeddings=tie, dtype="float32",
        pattern=(MixerSpec(mixer=mixer, options=options),),
    )  # fmt: skip
    return abstract_model(config)[1]


@pytest.mark.parametrize("mixer", ["delta_net", "gated_delta_net"])
@pytest.mark.parametrize("tie", [False, True])
def test_every_parameter_has_a_rule_and_stacked_axes_stay_whole(mixer: str, tie: bool) -> None:
    parameters = _parameters(mixer, tie)
    shardings = parameter_shardings(parameters, make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
    flat = {path_string(path): sharding.spec for path, sharding in jax.tree_util.tree_leaves_with_path(shardings)}
    assert flat["embed/embedding"] == P("tensor", "fsdp")
    assert flat["blocks/0/mixer/q_proj/kernel"] == P(None, "fsdp", "tensor")
    assert flat["blocks/0/mixer/o_proj/kernel"] == P(None, "tensor", "fsdp")
    assert flat["blocks/0/mixer/k_conv/kernel"] == P(None, None, "tensor")
    assert flat["blocks/0/mlp_norm/scale"] == P(None, None)
    assert ("lm_head/kernel" in flat) is not tie
    if mixer == "gated_delta_net":
        assert flat["blocks/0/mixer/A_log"] == P(None, "tensor")
        assert flat["blocks/0/mixer/dt_bias"] == P(None, "tensor")
    assert all(spec[0] is None for path, spec in flat.items() if path.startswith("blocks/"))


def test_parameters_no_rule_fits() -> None:
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with pytest.raises(ValueError, match=r"no partition rule names the parameter blocks/0/mixer/z_proj/kernel"):
        partition_spec("blocks/0/mixer/z_proj/kernel", (2, 16, 16), mesh)
    with pytest.raises(
        ValueError, match=r"embed/embedding of shape \(257, 16\): dimension 0 \(257\).* tensor of size 2"
    ):
        partition_spec("embed/embedding", (257, 16), mesh)
    with pytest.raises(ValueError, match=r"lm_head/kernel has shape \(16,\), but its partition rule is for 2 axes"):
        partition_spec("lm_head/kernel", (16,), mesh)


def test_a_batch_is_cut_over_data_and_fsdp() -> None:
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    array = np.arange(2 * 8 * 3).reshape(2, 8, 3).astype(np.int32)
    placed = shard_batch({"inputs": array}, mesh)["inputs"]
    np.testing.assert_array_equal(np.asarray(placed), array)
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 2, 3)}


def test_an_axis_over_tokens_cuts_batches_and_parameters() -> None:
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, sequence=2, tensor=2))
    placed = shard_batch({"inputs": np.arange(2 * 8 * 4).reshape(2, 8, 4)}, mesh)["inputs"]
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 4, 2)}
    assert tuple(partition_spec("blocks/0/mixer/q_proj/kernel", (2, 8, 16), mesh)) == (
        None,
        ("fsdp", "sequence"),
        "tensor",
    )
    with pytest.raises(
        ValueError, match=r"dimension 0 \(6\) does not divide over the mesh axes fsdp x sequence of size 2 x 2"
    ):
        partition_spec("lm_head/kernel", (6, 16), mesh)
