"""Static schedules of TPU kernels: what the TPU compiler says a kernel costs, read on a CPU host."""

GENERATIONS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
"""Those that are compiled for, and the slice whose first chip it is."""
