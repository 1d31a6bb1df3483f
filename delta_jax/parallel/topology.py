"""TPUs that need not be here: the devices of a slice, as its compiler describes them."""

import importlib.util
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from delta_jax.parallel.gpus import GPUS, Gpu, gpu_of

# What libtpu asks the machine it runs on before it describes another: with these it asks nothing, and it lets other
# processes load it too, which is safe as long as none of them uses a chip.
_ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


@dataclass(frozen=True, kw_only=True)
class Chip:
    """A generation of TPUs, from Google Cloud's page of each.

    Attributes:
        axes: how many axes its slices have.
        most: chips of the largest slice.
        hbm_gib: memory of a chip, in GiB.
        flops: products in bfloat16, operations a second.
        hbm_bytes: bytes a second to and from that memory.
        ici_bytes: bytes a second that a chip can receive from others of its slice, over all of its links, two an axis:
            half of what those pages call bidirectional, which is 1,600 Gbit/s one way on v5e.

    Examples:
        >>> CHIPS["v5e"].hbm_gib
        16
    """

    axes: int
    most: int
    hbm_gib: int
    flops: float
    hbm_bytes: float
    ici_bytes: float


CHIPS = {
    "v4": Chip(axes=3, most=4096, hbm_gib=32, flops=275e12, hbm_bytes=1.228e12, ici_bytes=300e9),
    "v5e": Chip(axes=2, most=256, hbm_gib=16, flops=197e12, hbm_bytes=0.819e12, ici_bytes=200e9),
    "v5p": Chip(axes=3, most=6144, hbm_gib=95, flops=459e12, hbm_bytes=2.765e12, ici_bytes=600e9),
    "v6e": Chip(axes=2, most=256, hbm_gib=32, flops=918e12, hbm_bytes=1.638e12, ici_bytes=400e9),
    "tpu7x": Chip(axes=3, most=9216, hbm_gib=192, flops=2307e12, hbm_bytes=7.38e12, ici_bytes=600e9),
}


def chip_of(topology: str) -> Chip:
    """The generation that the name of a slice begins with.

    Raises:
        ValueError: the name is not a generation and a grid of chips; libtpu alone would take some of these down with it.

    Examples:
        >>> chip_of("v5e:4x4").axes
        2
    """
    generation, _, grid = topology.partition(":")
    chip = CHIPS.get(generation)
    if chip is None:
        raise ValueError(
            f"topology {topology!r}: the generations are {', '.join(CHIPS)}, as in v5e:16x16, and the kinds of GPU "
            f"{', '.join(GPUS)}, as in h100:8"
        )
    shape = "x".join(["2"] * chip.axes)
    if re.fullmatch("x".join(["[1-9][0-9]{0,4}"] * chip.axes), grid) is None:
        raise ValueError(
            f"topology {topology!r}: wanted {chip.axes} numbers of chips from 1 on, with x between them, as in "
            f"{generation}:{shape}"
        )
    if (chips := math.prod(map(int, grid.split("x")))) > chip.most:
        raise ValueError(
            f"topology {topology!r} has {chips:,} chips, but the largest slice of {generation} {chip.most:,}"
        )
    return chip


def chip_or_gpu_of(topology: str) -> Chip | Gpu:
    """The generation of TPUs or the kind of GPU that the name of a topology begins with.

    Raises:
        ValueError: as `chip_of` and `gpu_of`.

    Examples:
        >>> chip_or_gpu_of("v5e:4x4").flops, chip_or_gpu_of("h100:8").flops
        (197000000000000.0, 989400000000000.0)
    """
    return gpu_of(topology)[0] if topology.partition(":")[0] in GPUS else chip_of(topology)


class Link(NamedTuple):
    """What joins the devices of a topology at one level.

    Attributes:
        name: what it lies between.
        place: of each device the place it is in; devices of one place need no such link.
        bandwidth: bytes a second that a device receives over it at the published peak.

    Examples:
        >>> Link("between hosts", (0, 0, 1, 1), 50e9).place  # of four devices on two hosts
        (0, 0, 1, 1)
    """

    name: str
    place: tuple[int, ...]
    bandwidth: float


def links_of(topology: str, devices: Sequence[jax.Device], order: Sequence[jax.Device]) -> tuple[Link, ...]:
    """What joins the devices of a topology, from the inside out.

    Between TPU chips those of the links that lead to a chip of the same slice: on an axis of two chips that is one of two.
    The two devices of a TPU7x chip share them, and exchange with each other for nothing.

    Args:
        topology: its name.
        devices: its devices, as `tpu_topology` or `gpu_topology` gives them.
        order: the same in the order in which their places are wanted, such as that of a mesh.

    Raises:
        ValueError: as `chip_or_gpu_of`.

    Examples:
        >>> devices = jax.devices()[:1]  # here gpu_topology("h100:1") would be asked
        >>> inside, between = links_of("h100:1", devices, devices)
        >>> inside.name, inside.bandwidth, between.name
        ('inside a host', 450000000000.0, 'between hosts')
    """
    chip = chip_or_gpu_of(topology)
    if isinstance(chip, Gpu):
        _, per_host, _ = gpu_of(topology)
        domain = max(1, chip.joined // per_host) * per_host
        index = {device: place for place, device in enumerate(devices)}
        each = tuple(index[device] for device in order)
        inside = Link("inside a host" if domain == per_host else "by NVLink", each, chip.inside)
        return inside, Link("between hosts", tuple(place // domain for place in each), chip.between)
    grid = [int(size) for size in topology.partition(":")[2].split("x")]
    found: dict[tuple[int, ...], int] = {}
    chips = tuple(found.setdefault(tuple(device.coords), len(found)) for device in order)
    used = sum(min(size - 1, 2) for size in grid) / (2 * chip.axes)
    return (Link("between chips", chips, used * chip.ici_bytes * len(found) / len(devices)),)


def tpu_topology(name: str) -> Sequence[jax.Device]:
    """The devices of a TPU slice, to compile for ahead of time on any machine that has libtpu.

    Args:
        name: generation and grid of chips, such as "v5e:16x16", "v5p:2x2x1", "v6e:1x1" or "tpu7x:2x2x1".

    Returns:
        Devices that describe themselves and run nothing: one a chip, on TPU7x two.

    Raises:
        ValueError: libtpu is not installed or cannot be loaded, or there is no such slice.

    Examples:
        >>> devices = tpu_topology("v5e:2x2")  # needs libtpu, but no TPU
        >>> len(devices), devices[0].platform
        (4, 'tpu')
    """
    chip_of(name)
    if importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
        raise ValueError('compiling for a TPU needs libtpu, which is not installed: pip install "delta_jax[tpu]"')
    for variable, value in _ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    # The two cores of a v4 chip are one device to JAX.
    options: dict[str, Any] = {"chip_config_name": "megacore"} if name.startswith("v4:") else {}
    try:
        return tuple(topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"topology {name!r}: there is no such slice; libtpu says: {reason}") from error
