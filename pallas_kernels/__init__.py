"""The delta rule as kernels: arrays in, arrays out, on JAX alone."""
