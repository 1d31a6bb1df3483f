"""Every test runs with eight virtual CPU devices and without silent dtype or rank promotion."""

import contextlib
import os
from pathlib import Path

import jax
import jaxtyping
import pytest

jax.config.update("jax_platforms", "cpu")
# The runtime has as many threads as cores or devices, whichever are more. An interpreted GPU kernel blocks four: the program
# that called it, its two warpgroups while they wait for each other, and what converts the arguments of their callbacks.
# With one device on two cores it hung in most runs, with four threads or these eight in none of twenty.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Most of a test's time is compilation, more than half of which optimisation: done where it is the op that is held to its
# last bits, and for accelerators; not elsewhere, nor in the processes that those tests start, nor for interpreted kernels.
OPTIMISED = tuple(Path(__file__).parent / name for name in ("ops", "tpu", "gpu"))
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"

# A program compiled for a CPU keeps hundreds of mappings of memory, of which Linux gives a process 65530; the next
# compilation after that is a crash.
MAPPINGS = Path("/proc/self/maps")
MOST_MAPPINGS = 20_000


def pytest_runtest_setup(item):
    if MAPPINGS.exists() and MAPPINGS.read_bytes().count(b"\n") > MOST_MAPPINGS:
        jax.clear_caches()
    params = getattr(getattr(item, "callspec", None), "params", {})
    interpreted = str(params.get("implementation")).startswith("mosaic") or item.path.name == "test_gpu_kernels.py"
    quick = interpreted or not any(item.path.is_relative_to(folder) for folder in OPTIMISED)
    jax.config.update("jax_disable_most_optimizations", quick)


@contextlib.contextmanager
def users_call():
    """Without the checks of every signature that the suite adds: bad input meets those of the library."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)


@pytest.fixture
def as_users_call():
    with users_call():
        yield


def _raises(*arguments, raises=pytest.raises, **keywords):
    """`pytest.raises`, inside of which calls are those of a user."""

    @contextlib.contextmanager
    def block():
        with raises(*arguments, **keywords) as raised, users_call():
            yield raised

    return block()


pytest.raises = _raises
