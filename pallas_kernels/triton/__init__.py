"""Triton kernels, for GPUs of AMD and NVIDIA: the pass of a state through all chunks."""
