"""The delta rule as Pallas kernels (Mosaic GPU) for NVIDIA GPUs: forward, backward and the one-token step.

`HOPPER` are those of one generation, which has products of its own; `PORTABLE` the same by what every generation since sm_80
has.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

from jax import Array

from pallas_kernels import devices
from pallas_kernels.gpu import op, plan, step
from pallas_kernels.gpu.machine import HOPPER as HOPPER_MACHINE
from pallas_kernels.gpu.machine import PORTABLE as MACHINES
from pallas_kernels.gpu.machine import Machine
from pallas_kernels.inputs import Inputs


@dataclasses.dataclass(frozen=True)
class Kernels:
    """The kernels by the products of one kind, for the device that the code being traced is for."""

    products: Literal["wgmma", "mma"]

    def machine(self) -> Machine | None:
        """That of the device, None where the kernels do not run."""
        generation = devices.generation()
        if self.products == "wgmma":
            return HOPPER_MACHINE if generation == "sm_90" else None
        return MACHINES.get(generation or "")

    def unsupported(self, inputs: Inputs) -> str | None:
        return plan.unsupported(self._machine(), inputs)

    @property
    def forward(self) -> Callable[..., tuple[Array, Array, Any]]:
        return functools.partial(op.forward, self._machine())

    @property
    def backward(self) -> Callable[..., tuple[Any, Array]]:
        return functools.partial(op.backward, self._machine())

    @property
    def delta_rule_step(self) -> Callable[..., tuple[Array, Array]]:
        return functools.partial(step.delta_rule_step, self._machine())

    def as_they_lie[Tree](self, arrays: Tree) -> Tree:
        """The same arrays: on a GPU XLA leaves the axes of an array in their order."""
        return arrays

    def _machine(self) -> Machine:
        machine = self.machine()
        assert machine is not None, f"no kernel by {self.products} runs on {devices.generation()}"
        return machine


HOPPER, PORTABLE = Kernels("wgmma"), Kernels("mma")

__all__ = ["HOPPER", "PORTABLE", "Kernels"]
