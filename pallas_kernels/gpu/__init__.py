"""The delta rule as Pallas kernels (Mosaic GPU) for NVIDIA Hopper: forward, backward and the one-token step."""

from pallas_kernels.gpu.op import backward, forward
from pallas_kernels.gpu.plan import unsupported
from pallas_kernels.gpu.step import delta_rule_step

__all__ = ["backward", "delta_rule_step", "forward", "unsupported"]
