"""The compiler of TPUs that are not here."""

from collections.abc import Callable
from typing import Any

import jax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from delta_jax.parallel import MeshConfig, make_mesh, tpu_topology

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}


@pytest.fixture(scope="session")
def compile_for() -> Callable[..., jax.stages.Compiled]:
    """`compile_for(generation, function, *shapes)`: the program of one TPU; skips where libtpu is not installed.

    The function may be one of `jax.jit`, with its options.
    """
    pytest.importorskip("libtpu", reason="libtpu, which compiles for TPUs that are not here, is not installed")

    def compiled(generation: str, function: Callable[..., Any], *shapes: Any) -> jax.stages.Compiled:
        mesh = make_mesh(MeshConfig(), tpu_topology(TOPOLOGIES[generation])[:1])
        whole = NamedSharding(mesh, PartitionSpec())
        placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), shapes)
        with jax.set_mesh(mesh):
            jitted: Any = function if hasattr(function, "lower") else jax.jit(function)
            return jitted.lower(*placed).compile()

    return compiled
