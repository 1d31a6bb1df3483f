"""The delta rule as Pallas kernels (Mosaic GPU) for NVIDIA Hopper: forward, backward and the one-token step."""

from pallas_kernels.gpu.op import as_they_lie, backward, forward
from pallas_kernels.gpu.plan import unsupported
from pallas_kernels.gpu.step import delta_rule_step

__all__ = ["as_they_lie", "backward", "delta_rule_step", "forward", "unsupported"]
