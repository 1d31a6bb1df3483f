"""The delta rule as Triton kernels, for GPUs of AMD and NVIDIA: the sequential forward pass."""
