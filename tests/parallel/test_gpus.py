"""Names of GPUs that are not here, and their descriptions."""

import importlib
import importlib.util

import jax
import pytest

from delta_jax.parallel import GPUS, Link, chip_or_gpu_of, gpu_of, gpu_topology, links_of
from delta_jax.parallel.gpus import Description

module = importlib.import_module("delta_jax.parallel.gpus")  # whose name a function of it has
WITHOUT = importlib.util.find_spec("jax_plugins") is None
TEXT = """gpu_device_info {
  core_count: 84
  memory_bandwidth: 768096000000
  device_memory_size: 51041271808
  cuda_compute_capability {
    major: 9
  }
}
device_description_str: "NVIDIA RTX A6000"
"""


@pytest.mark.parametrize(("name", "hosts"), [("h100:8", 1), ("h100:8x4", 4), ("rtxpro6000:8x1", 1)])
def test_names(name: str, hosts: int) -> None:
    gpu, per_host, found = gpu_of(name)
    assert (gpu, per_host, found) == (GPUS[name.partition(":")[0]], 8, hosts)
    assert chip_or_gpu_of(name) == gpu


def test_links() -> None:
    """Any eight devices stand for the GPUs: their places are those in their topology, in the order that is asked for."""
    devices, order = jax.devices(), jax.devices()[::-1]
    inside, between = links_of("h100:4x2", devices, order)
    assert inside == Link("inside a host", (7, 6, 5, 4, 3, 2, 1, 0), 450e9)
    assert between == Link("between hosts", (1, 1, 1, 1, 0, 0, 0, 0), 50e9)
    assert links_of("a100:8", devices, devices)[1].place == (0,) * 8
    inside, between = links_of("gb200:4x2", devices, devices)
    assert (inside.name, between.place) == ("by NVLink", (0,) * 8), "NVLink joins 72 of them, whatever host they are in"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("h100", "wanted GPUs a host"),
        ("h100:", "as in h100:8 or h100:8x4"),
        ("h100:0", "numbers from 1 on"),
        ("h100:8x0", "numbers from 1 on"),
        ("h100:8x4x2", "wanted GPUs a host"),
        ("h100:-1", "wanted GPUs a host"),
        ("h100:8 ", "wanted GPUs a host"),
        ("h100:99999999999", "wanted GPUs a host"),
        ("a100:999x999", "has 998,001 GPUs: wanted at most 16,384"),
        ("h101:8", "the kinds of GPU a100, a6000, rtx4090, h100, h200, b200, gb200, b300, rtxpro6000, as in h100:8"),
        ("H100:8", "the kinds of GPU"),
    ],
)
def test_bad_names(name: str, message: str) -> None:
    with pytest.raises(ValueError) as raised:
        chip_or_gpu_of(name)
    assert str(raised.value).startswith(f"topology {name!r}") and message in str(raised.value)


@pytest.mark.skipif(not WITHOUT, reason="the compiler for GPUs is installed")
def test_without_the_compiler() -> None:
    with pytest.raises(ValueError) as raised:
        gpu_topology("h100:8")
    assert "needs jax-cuda13-plugin and nvidia-cuda-nvcc and nvidia-nvvm" in str(raised.value)
    assert 'pip install "delta_jax[gpu-compiler]"' in str(raised.value)


def test_descriptions() -> None:
    told = Description(TEXT)
    assert (told.kind, told.cores, told.capability) == ("NVIDIA RTX A6000", 84, (9, 0))
    assert (told.memory, told.bandwidth, told.number("absent")) == (51041271808, 768096000000.0, 0.0)


def test_a_change_of_what_a_plugin_no_longer_says_is_no_change_that_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_descriptions", lambda: (TEXT,))
    module.description.cache_clear()
    assert module.description(GPUS["a6000"]).cores == 84
    with pytest.raises(ValueError) as raised:
        module.description(GPUS["rtx4090"])
    assert "without 'minor: 6'" in str(raised.value)
    with pytest.raises(ValueError) as raised:
        module.description(GPUS["h100"])
    assert "does not describe NVIDIA H100 80GB HBM3" in str(raised.value)
    module.description.cache_clear()
