"""NVIDIA GPUs that need not be here: their devices, as XLA's CUDA plugin describes them."""

import functools
import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

EXTRA = 'pip install "delta_jax[gpu-compiler]"'


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A kind of GPU.

    Attributes:
        described: what the plugin calls the GPU whose description is taken.
        changes: what is not as in that description, text and what takes its place.
        flops: products in bfloat16 summed in float32, operations a second, without sparsity, from NVIDIA's data sheet.
        inside: bytes a second that a GPU can receive from others of its host, half of what data sheets give for both ways:
            NVLink where there is one, else its PCIe slot.
        between: bytes a second that a GPU can receive from other hosts: of the adapter that NVIDIA's own system has for
            each GPU, and where there is no such system of the slot.
        joined: how many GPUs NVLink joins where those are more than a host's.

    Examples:
        >>> GPUS["h100"].described
        'NVIDIA H100 80GB HBM3'
    """

    described: str
    flops: float
    inside: float
    between: float
    joined: int = 1
    changes: tuple[tuple[str, str], ...] = ()


# Kernels for one architecture alone, which JAX's are, want "sm_120a".
_ACCELERATED = ("feature_extension: NONE", "feature_extension: ACCELERATED_FEATURES")
_RTX4090 = (
    ("minor: 6", "minor: 9"),
    ("core_count: 84", "core_count: 128"),
    ("memory_bandwidth: 768096000000", "memory_bandwidth: 1008096000000"),
    ("l2_cache_size: 6291456", "l2_cache_size: 75497472"),
    ("device_memory_size: 51041271808", "device_memory_size: 25757220864"),
    ("clock_rate_ghz: 1.8", "clock_rate_ghz: 2.52"),
    ("NVIDIA RTX A6000", "NVIDIA GeForce RTX 4090"),
)

_PCIE4, _PCIE5 = 32e9, 64e9  # 16 lanes, one way

# NVLink of the third, fourth and fifth generation: 600, 900 and 1,800 GB/s both ways; the bridge between two A6000 112.5.
# Adapters: 200 Gbit/s a GPU in a DGX A100, 400 in a DGX H100, H200 and B200 and in a GB200 NVL72, 800 in a DGX B300.
GPUS = {
    "a100": Gpu(described="NVIDIA A100-SXM4-80GB", flops=312e12, inside=300e9, between=25e9),
    "a6000": Gpu(described="NVIDIA RTX A6000", flops=154.8e12, inside=56.25e9, between=_PCIE4),
    "rtx4090": Gpu(described="NVIDIA RTX A6000", flops=165.2e12, inside=_PCIE4, between=_PCIE4, changes=_RTX4090),
    "h100": Gpu(described="NVIDIA H100 80GB HBM3", flops=989.4e12, inside=450e9, between=50e9),
    "h200": Gpu(described="NVIDIA H200 141GB HBM3e", flops=989.4e12, inside=450e9, between=50e9),
    "b200": Gpu(described="NVIDIA B200", flops=2250e12, inside=900e9, between=50e9),
    "gb200": Gpu(described="NVIDIA GB200", flops=2500e12, inside=900e9, between=50e9, joined=72),
    "b300": Gpu(described="NVIDIA B300", flops=2250e12, inside=900e9, between=100e9),
    "rtxpro6000": Gpu(
        described="NVIDIA RTX PRO 6000 Blackwell",
        flops=503.8e12,
        inside=_PCIE5,
        between=_PCIE5,
        changes=(_ACCELERATED,),
    ),
}


class Description:
    """What the plugin says of a GPU, a text of `name: value` lines."""

    def __init__(self, text: str) -> None:
        self.text = text

    def number(self, name: str) -> float:
        """The first number of that name, 0 where it is left out."""
        found = re.search(rf"\b{name}: ([\d.]+)", self.text)
        return float(found.group(1)) if found else 0.0

    @property
    def kind(self) -> str:
        """What a device of this kind calls itself."""
        found = re.search(r'device_description_str: "(.*)"', self.text)
        return found.group(1) if found else ""

    @property
    def capability(self) -> tuple[int, int]:
        """Of CUDA, such as (9, 0)."""
        return int(self.number("major")), int(self.number("minor"))

    @property
    def cores(self) -> int:
        """Streaming multiprocessors."""
        return int(self.number("core_count"))

    @property
    def memory(self) -> int:
        """Bytes of its memory."""
        return int(self.number("device_memory_size"))

    @property
    def bandwidth(self) -> float:
        """Bytes a second between the GPU and its memory."""
        return self.number("memory_bandwidth")


def gpu_of(topology: str) -> tuple[Gpu, int, int]:
    """The kind of GPU, GPUs a host, and hosts, that the name of a topology means.

    Raises:
        ValueError: the name is not a kind of GPU and one or two numbers.

    Examples:
        >>> gpu, per_host, hosts = gpu_of("h100:8x4")
        >>> per_host, hosts
        (8, 4)
    """
    kind, _, grid = topology.partition(":")
    if kind not in GPUS:
        raise ValueError(f"topology {topology!r}: the kinds of GPU are {', '.join(GPUS)}, as in h100:8")
    if re.fullmatch(r"[1-9][0-9]{0,4}(x[1-9][0-9]{0,4})?", grid) is None:
        raise ValueError(
            f"topology {topology!r}: wanted GPUs a host, and hosts where there are several, numbers from 1 on, as in "
            f"{kind}:8 or {kind}:8x4"
        )
    per_host, hosts = ([int(n) for n in grid.split("x")] + [1])[:2]
    if hosts * per_host > 16384:
        raise ValueError(f"topology {topology!r} has {hosts * per_host:,} GPUs: wanted at most 16,384")
    return GPUS[kind], per_host, hosts


def gpu_topology(name: str) -> Sequence[jax.Device]:
    """The devices of so many NVIDIA GPUs, to compile for ahead of time on any Linux machine.

    Args:
        name: kind of GPU and GPUs a host, such as "h100:8", or with hosts, "h100:8x4".

    Returns:
        Devices that describe themselves and run nothing.

    Raises:
        ValueError: the compiler, or a part of it, is not installed or cannot be loaded, or there is no such kind of GPU.

    Examples:
        >>> devices = gpu_topology("h100:8")  # needs the extra gpu-compiler, but no GPU
        >>> len(devices), devices[0].platform
        (8, 'gpu')
    """
    gpu, per_host, hosts = gpu_of(name)
    text = description(gpu).text
    # Slices, hosts of each, GPUs of each host.
    shape = f"1x{hosts}x{per_host}"
    try:
        found = topologies.get_topology_desc("gpu", platform="cuda", target_config=text, topology=shape)
    except NotImplementedError as error:
        raise ValueError(
            "JAX did not load its CUDA plugin; where there is no GPU it needs JAX_PLATFORMS=cpu"
        ) from error
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"topology {name!r}: the CUDA plugin says: {reason}") from error
    return tuple(found.devices)


@functools.cache
def description(gpu: Gpu) -> Description:
    """What the installed plugin says of a kind of GPU.

    Raises:
        ValueError: the compiler is not installed, or its plugin does not describe this kind.
    """
    text = next((text for text in _descriptions() if f'device_description_str: "{gpu.described}"' in text), None)
    if text is None:
        raise ValueError(f"the installed CUDA plugin of JAX does not describe {gpu.described}: wanted that of JAX 0.12")
    for old, new in gpu.changes:
        if old not in text:
            raise ValueError(f"the CUDA plugin describes {gpu.described} without {old!r}: wanted that of JAX 0.12.0.1")
        text = text.replace(old, new)
    return Description(text)


@functools.cache
def _descriptions() -> tuple[str, ...]:
    """Of every GPU that the plugin knows: texts within its library, each ended by a zero."""
    blob = _plugin().read_bytes()
    found = []
    for match in re.finditer(rb"gpu_device_info \{", blob):
        start, end = blob.rfind(b"\0", 0, match.start()) + 1, blob.find(b"\0", match.start())
        found.append(blob[start:end].decode("utf8", "replace"))
    return tuple(found)


def _plugin() -> Path:
    """The library of the CUDA plugin.

    Raises:
        ValueError: it, or a program that it calls, is not installed.
    """
    found = _inside("jax_plugins", "xla_cuda*/xla_cuda_plugin.so")
    missing = [
        package
        for package, there in (
            ("jax-cuda13-plugin", found),
            ("nvidia-cuda-nvcc", _inside("nvidia", "cu*/bin/ptxas")),
            ("nvidia-nvvm", _inside("nvidia", "cu*/nvvm/libdevice/libdevice*.bc")),
        )
        if not there
    ]
    if missing:
        raise ValueError(f"compiling for a GPU needs {' and '.join(missing)}, not installed here: {EXTRA}")
    return found[0]


def disassembler() -> Path:
    """The program that lists machine code.

    Raises:
        ValueError: it is not installed.
    """
    found = _inside("nvidia", "cu*/bin/nvdisasm")
    if not found:
        raise ValueError(f"listing machine code needs nvidia-cuda-nvdisasm, not installed here: {EXTRA}")
    return found[0]


def _inside(package: str, pattern: str) -> list[Path]:
    spec: Any = importlib.util.find_spec(package)
    roots = spec.submodule_search_locations if spec else None
    return [path for root in roots or () for path in Path(root).glob(pattern)]
