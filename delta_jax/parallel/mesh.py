"""The device mesh: data, fsdp, sequence and tensor axes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
from jax.sharding import AxisType, Mesh

from delta_jax.config import check_fields, convert

AXES = ("data", "fsdp", "sequence", "tensor")


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Sizes of the mesh axes; one of them may be -1 and then takes the devices the others leave.

    Attributes:
        data: copies of the model, each with its own part of the batch.
        fsdp: parts into which parameters are cut; the batch is cut along it too.
        sequence: parts into which the tokens of every sequence are cut; parameters are cut as if there were as many more of
            fsdp.
        tensor: parts into which heads, MLP channels and the vocabulary are cut.

    Examples:
        >>> MeshConfig(fsdp=4, tensor=2)  # and copies on what is left
        MeshConfig(data=-1, fsdp=4, sequence=1, tensor=2)
    """

    data: int = -1
    fsdp: int = 1
    sequence: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        check_fields(self)
        sizes = {name: getattr(self, name) for name in AXES}
        for name, size in sizes.items():
            if size < 1 and size != -1:
                raise ValueError(f"{name} should be a positive number of devices or -1 (the rest), got {size}")
        if list(sizes.values()).count(-1) > 1:
            raise ValueError(f"only one mesh axis can be -1 (the rest), got {sizes}")


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes data, fsdp, sequence and tensor, whose shardings the compiler propagates
    (``AxisType.Auto``).

    Args:
        config: the sizes of the axes.
        devices: the devices to use, all of them; default ``jax.devices()``.

    Returns:
        The mesh.

    Raises:
        ValueError: the sizes do not multiply to the number of devices.

    Examples:
        >>> mesh = make_mesh(MeshConfig(), jax.devices()[:1])
        >>> dict(mesh.shape)
        {'data': 1, 'fsdp': 1, 'sequence': 1, 'tensor': 1}
    """
    convert(MeshConfig, config, "config")
    devices = jax.devices() if devices is None else list(devices)
    sizes = [getattr(config, name) for name in AXES]
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if -1 in sizes or math.prod(sizes) != len(devices):
        wanted = ", ".join(f"{name}={size}" for name, size in zip(AXES, sizes, strict=True))
        raise ValueError(f"mesh {wanted} does not fit the {len(devices)} {devices[0].platform} device(s) there are")
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)
