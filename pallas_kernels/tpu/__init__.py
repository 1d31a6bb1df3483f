"""The delta rule as Pallas kernels for TPU v5e, v5p, v6e and TPU7x: forward, backward and the one-token step."""

from pallas_kernels.tpu.layout import as_they_lie
from pallas_kernels.tpu.op import backward, forward
from pallas_kernels.tpu.plan import unsupported
from pallas_kernels.tpu.step import delta_rule_step

__all__ = ["as_they_lie", "backward", "delta_rule_step", "forward", "unsupported"]
