"""Meshes and the rules by which parameters and batches are cut over them."""

from delta_jax.parallel.mesh import AXES, MeshConfig, make_mesh
from delta_jax.parallel.sharding import (
    RULES,
    batch_parts,
    batch_sharding,
    parameter_shardings,
    partition_spec,
    path_string,
    replicated,
    shard_batch,
)

__all__ = [
    "AXES",
    "RULES",
    "MeshConfig",
    "batch_parts",
    "batch_sharding",
    "make_mesh",
    "parameter_shardings",
    "partition_spec",
    "path_string",
    "replicated",
    "shard_batch",
]
