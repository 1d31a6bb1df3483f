"""Meshes and the rules by which parameters and batches are cut over them."""

from delta_jax.parallel.gpus import GPUS, Gpu, gpu_of, gpu_topology
from delta_jax.parallel.mesh import AXES, MeshConfig, make_mesh
from delta_jax.parallel.op import (
    by_compiler,
    by_heads,
    by_shares,
    by_tokens,
    current_cut,
    cut_batch,
    indivisible,
    share_of,
    shares,
    spec_of,
)
from delta_jax.parallel.sharding import (
    RULES,
    ParameterRule,
    batch_parts,
    batch_sharding,
    parameter_shardings,
    partition_spec,
    path_string,
    replicated,
    shard_batch,
)
from delta_jax.parallel.topology import CHIPS, Chip, Link, chip_of, chip_or_gpu_of, links_of, tpu_topology

__all__ = [
    "AXES",
    "CHIPS",
    "GPUS",
    "RULES",
    "Chip",
    "Gpu",
    "Link",
    "MeshConfig",
    "ParameterRule",
    "batch_parts",
    "batch_sharding",
    "by_compiler",
    "by_heads",
    "by_shares",
    "by_tokens",
    "chip_of",
    "chip_or_gpu_of",
    "current_cut",
    "cut_batch",
    "gpu_of",
    "gpu_topology",
    "indivisible",
    "links_of",
    "make_mesh",
    "parameter_shardings",
    "partition_spec",
    "path_string",
    "replicated",
    "shard_batch",
    "share_of",
    "shares",
    "spec_of",
    "tpu_topology",
]
