"""Triton kernels as functions of JAX arrays: compiled for the GPU that is traced for, interpreted on a CPU.

Triton compiles ahead of time, without a device; jaxlib's plugins for CUDA and ROCm launch what it made. A kernel's
parameters are its inputs, its outputs, and constants: whole arrays, laid out row after row.
"""

import functools
import os
import tempfile
import zlib
from typing import Any

import jax
import triton
from jax import Array
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pallas_kernels import devices
from pallas_kernels.triton import interpreter

# What CUDA's assembler has read since 12.9. Triton would write for the one it brings, and jaxlib takes the one it finds,
# which may be older.
PTX_VERSION = 88
ALIGNED = 16  # bytes, what XLA's allocator promises and Triton's wide loads need
TYPES = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32", "int32": "*i32"}
BINARIES = tempfile.TemporaryDirectory()


class Kernel(triton.JITFunction):
    """A kernel, or a function that kernels call, which is compiled, and interpreted where it is called as it is."""

    def __call__(self, *arguments: Any, **constants: Any) -> Any:
        return interpreter.function(self.fn)(*arguments, **constants)


def call(
    kernel: Kernel,
    grid: tuple[int, ...],
    inputs: tuple[Array, ...],
    outputs: tuple[jax.ShapeDtypeStruct, ...],
    *,
    warps: int = 4,
    stages: int = 2,
    **constants: Any,
) -> tuple[Array, ...]:
    """The outputs of a kernel whose parameters are the inputs, the outputs and the constants, in that order.

    On a CPU every program is interpreted by numpy, in a callback. `jax.vmap` and derivatives are for those around it.

    Raises:
      ValueError: the device is none that kernels are compiled for, or JAX has no plugin for it.
    """
    here = target()
    if here is None:
        run = functools.partial(interpreter.run, kernel.fn, grid, outputs, constants)
        return tuple(jax.pure_callback(run, outputs, *inputs))
    arrays: tuple[Any, ...] = (*inputs, *outputs)
    types = tuple(TYPES[str(x.dtype)] for x in arrays)
    opaque = _compiled(kernel, here, grid, types, warps, stages, tuple(constants.items()))
    return tuple(jax.ffi.ffi_call("triton_kernel_call_ffi", outputs)(*inputs, opaque=opaque))


def target() -> GPUTarget | None:
    """What is compiled for where this is traced; None where it is interpreted."""
    return target_of(jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0])


def unavailable() -> str | None:
    """Why no kernel can be compiled where this is traced; None if one can."""
    try:
        target()
    except ValueError as error:
        return str(error)
    return None


def target_of(device: Any) -> GPUTarget | None:
    """What is compiled for; None where it is interpreted."""
    if device.platform == "cpu":
        return None
    known = devices.generation_of(device) or ""
    if known.startswith("sm_"):
        return GPUTarget("cuda", int(known.removeprefix("sm_")), 32)
    if known.startswith("gfx9"):  # jaxlib takes a warp for 64 threads
        return GPUTarget("hip", known, 64)
    raise ValueError(
        f"Triton kernels are compiled for NVIDIA's GPUs and AMD's of the MI series, and not for {device.device_kind}"
    )


def compiled(
    kernel: Kernel, target: GPUTarget, types: tuple[str, ...], warps: int, stages: int, constants: dict[str, Any]
) -> Any:
    """A kernel as Triton compiles it for a GPU that need not be there."""
    names = kernel.arg_names
    signature = {name: types[i] if i < len(types) else "constexpr" for i, name in enumerate(names)}
    aligned = {(i,): [["tt.divisibility", ALIGNED]] for i in range(len(types))}
    options: dict[str, Any] = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    if target.backend == "cuda":
        options["ptx_version"] = PTX_VERSION
    return triton.compile(ASTSource(kernel, signature, constants, aligned), target=target, options=options)


@functools.cache
def _compiled(
    kernel: Kernel,
    target: GPUTarget,
    grid: tuple[int, ...],
    types: tuple[str, ...],
    warps: int,
    stages: int,
    constants: tuple[tuple[str, Any], ...],
) -> bytes:
    """A kernel and its grid as jaxlib's launcher reads them."""
    from jaxlib import gpu_triton

    if not hasattr(gpu_triton, "TritonKernel"):
        raise ValueError("Triton kernels need JAX's plugin for CUDA or ROCm, and neither is installed here")
    made = compiled(kernel, target, types, warps, stages, dict(constants))
    about = made.metadata
    nvidia = target.backend == "cuda"
    launched = gpu_triton.TritonKernel(
        about.name,
        about.num_warps,
        about.num_ctas,
        about.shared,
        made.asm["ptx"] if nvidia else _kept(made.asm["hsaco"]),
        str(made.asm["ttir"]),
        target.arch if nvidia else 0,
    )
    pointers = [gpu_triton.create_array_parameter(0, ALIGNED) for _ in types]
    sizes = (*grid, 1, 1)[:3]
    return zlib.compress(gpu_triton.TritonKernelCall(launched, *sizes, pointers).to_proto(about.name, b""))


def _kept(binary: bytes) -> str:
    """The file from which jaxlib takes a binary for ROCm, once, when it first launches it."""
    descriptor, path = tempfile.mkstemp(dir=BINARIES.name)
    with os.fdopen(descriptor, "wb") as file:
        file.write(binary)
    return path
