"""Static schedules of TPU kernels: what the TPU compiler says a kernel costs, read on a CPU host."""
