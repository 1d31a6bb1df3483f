"""The delta rule as Pallas kernels (Mosaic GPU) for NVIDIA Hopper: forward, backward and the one-token step."""

from pallas_kernels.gpu.op import delta_rule
from pallas_kernels.gpu.plan import unsupported
from pallas_kernels.gpu.step import delta_rule_step

__all__ = ["delta_rule", "delta_rule_step", "unsupported"]
