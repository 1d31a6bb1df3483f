"""How every implementation is tried on a CPU: a line for each, by which the contract suite holds it to the definition."""

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple
from unittest import mock

from delta_jax.ops import containment, delta_product, device
from delta_jax.ops.implementations import CHUNKWISE, IMPLEMENTATIONS
from delta_jax.testing.members import MEMBERS, op_of


class Trial(NamedTuple):
    """What the suite does to an implementation.

    Attributes:
      dtypes: what it takes; with float32 it is held to the last bits, else to what rounding to bfloat16 does.
      sizes: `time` and `shape` of `problem` that it takes; those of `problem` where there are none.
      chunk_sizes: values of `chunk_size` that are tried.
      interpreted: a context in which kernels run on a CPU.
      named: a context in which an implementation goes by this name, or runs on a CPU, that else does not.

    Examples:
        >>> TRIALS["mosaic_gpu"].dtypes
        ('bfloat16',)
    """

    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    sizes: dict[str, Any] = {}  # noqa: RUF012
    chunk_sizes: tuple[int | None, ...] = (None,)
    interpreted: Callable[[], AbstractContextManager[None]] | None = None
    named: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext

    @property
    def members(self) -> list[str]:
        """Those it is tried on. Kernels see several writes a token as several tokens, which needs no trial of each."""
        return [name for name in MEMBERS if self.interpreted is None or op_of(name) is not delta_product]


@contextlib.contextmanager
def interpreted_tpu() -> Iterator[None]:
    """TPU kernels run in interpretation on the CPU: memory nobody wrote holds NaN, and a race is an error.

    Examples:
        >>> with interpreted_tpu():
        ...     implementations()["mosaic_tpu"] is None
        True
    """
    from jax.experimental.pallas import tpu as pltpu

    from pallas_kernels.tpu import layout

    parameters = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    with (
        mock.patch.object(device, "platform", return_value="tpu"),
        # There are no layouts here, and a loop that holds an interpreted kernel cannot be mapped.
        mock.patch.object(layout, "lying", lambda *arrays: arrays),
        pltpu.force_tpu_interpret_mode(parameters),
    ):
        yield


@contextlib.contextmanager
def interpreted_gpu(generation: str = "sm_90") -> Iterator[None]:
    """The kernels of a GPU run in interpretation on the CPU, which needs a CPU of at least four devices.

    Examples:
        >>> with interpreted_gpu():
        ...     implementations()["mosaic_gpu"] is None
        True
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from pallas_kernels import devices
    from pallas_kernels.gpu import warpgroup

    with (
        mock.patch.object(device, "platform", return_value="gpu"),
        mock.patch.object(devices, "generation", return_value=generation),
        mock.patch.object(warpgroup, "INTERPRET", plgpu.InterpretGPUParams()),
    ):
        yield


@contextlib.contextmanager
def xla_of_accelerators() -> Iterator[None]:
    """What "xla" is on accelerators runs here too, as "xla_parallel".

    Examples:
        >>> with xla_of_accelerators():
        ...     implementations()["xla_parallel"] is None
        True
    """
    (xla,) = (one for one in IMPLEMENTATIONS if one.name == "xla")
    run = functools.partial(containment.run, CHUNKWISE[True])
    records = (*IMPLEMENTATIONS, xla._replace(name="xla_parallel", run=run, automatic=lambda given: "it is asked for"))
    # By its path, for the package has a function of the module's name.
    module = importlib.import_module("delta_jax.ops.implementations")
    with mock.patch.object(module, "IMPLEMENTATIONS", records):
        yield


@contextlib.contextmanager
def interpreted_triton() -> Iterator[None]:
    """The Triton kernel runs in interpretation on the CPU, if Triton is installed.

    Examples:
        >>> with interpreted_triton():
        ...     "not installed" in (implementations()["triton"] or "not installed")
        True
    """
    with mock.patch.object(device, "platform", return_value="gpu"):
        yield


TRIALS = {
    "recurrent": Trial(),
    "xla": Trial(chunk_sizes=(16, 64)),
    "xla_parallel": Trial(chunk_sizes=(16,), named=xla_of_accelerators),
    "triton": Trial(named=interpreted_triton),
    # Head sizes that fill registers, and more than a tile of 128 tokens.
    "mosaic_tpu": Trial(sizes={"time": 140, "shape": (1, 1, 2, 64, 64)}, interpreted=interpreted_tpu),
    "mosaic_gpu": Trial(("bfloat16",), {"time": 100, "shape": (1, 1, 1, 64, 64)}, interpreted=interpreted_gpu),
    # As a GPU has it that has little shared memory: one chunk at a time.
    "mosaic_mma": Trial(
        ("bfloat16",),
        {"time": 100, "shape": (1, 1, 1, 64, 64)},
        interpreted=functools.partial(interpreted_gpu, "sm_120"),
    ),
}
