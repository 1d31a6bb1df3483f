"""TPUs that need not be here: the devices of a slice, as its compiler describes them."""

import importlib.util
import os
from collections.abc import Sequence

import jax
from jax.experimental import topologies

# What libtpu asks the machine it runs on before it describes another: with these it asks nothing, and it lets other
# processes load it too, which is safe as long as none of them uses a chip.
_ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


def tpu_topology(name: str) -> Sequence[jax.Device]:
    """The devices of a TPU slice, to compile for ahead of time on any machine that has libtpu.

    Args:
        name: generation and grid of chips, such as "v5e:16x16", "v5p:2x2x1", "v6e:1x1" or "tpu7x:2x2x1".

    Returns:
        Devices that describe themselves and run nothing: one a chip, on v4 and TPU7x two.

    Raises:
        ValueError: libtpu is not installed or cannot be loaded, or there is no such slice.
    """
    if importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
        raise ValueError('compiling for a TPU needs libtpu, which is not installed: pip install "delta_jax[tpu]"')
    for variable, value in _ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    try:
        return tuple(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        wanted = 'a generation and a grid of chips, such as "v5e:16x16", "v5p:2x2x1", "v6e:2x2" or "tpu7x:2x2x1"'
        raise ValueError(f"topology {name!r}: wanted {wanted}; libtpu says: {reason}") from error
