"""Static schedules of GPU kernels: what NVIDIA's compiler makes of them, read on a machine without a GPU."""

CHIPS = ("h100", "h200")
"""Those that the kernels are made for."""
