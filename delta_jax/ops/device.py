"""The device that the code being traced is for."""

import re

import jax


def platform() -> str:
    """The kind of device that the code being traced is for: that of the current mesh if it names one, else the default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def accelerator() -> bool:
    """Whether that device is none of the CPU's: products are cheap there, and every one of them takes time to start."""
    return platform() != "cpu"


def hopper() -> bool:
    """Whether that device is a GPU of NVIDIA's Hopper generation."""
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
    return platform() == "gpu" and re.search(r"\bG?H(20|100|200|800)\b", device.device_kind) is not None
