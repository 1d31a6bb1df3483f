"""Every test runs with eight virtual CPU devices and without silent dtype or rank promotion."""

import jax

jax.config.update("jax_platforms", "cpu")
# The runtime has as many threads as cores or devices, whichever are more. An interpreted GPU kernel blocks four: the program
# that called it, its two warpgroups while they wait for each other, and what converts the arguments of their callbacks.
# With one device on two cores it hung in most runs, with four threads or these eight in none of twenty.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
