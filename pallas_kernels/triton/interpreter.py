"""Triton's interpreter without torch: kernels on numpy's arrays, one program after the other."""

import functools
import threading
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from triton.runtime import interpreter

_ALONE = threading.Lock()  # the interpreter changes Triton's language while it runs


class Pointer:
    """As much of a tensor as the interpreter asks for."""

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.dtype = array, str(array.dtype)

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def untyped_storage(self) -> "Pointer":
        return self

    def cpu(self) -> "Pointer":
        return self

    def new_empty(self, size: int, device: str) -> "Pointer":
        return Pointer(self.array)

    def set_(self, *where: Any) -> None:
        pass

    def storage_offset(self) -> int:
        return 0

    size = stride = storage_offset

    def copy_(self, other: "Pointer") -> None:
        pass


@functools.cache
def function(fn: Callable[..., Any]) -> Any:
    """A function in Triton's language, interpreted."""
    return interpreter.InterpretedFunction(fn)


def run(
    fn: Callable[..., Any],
    grid: tuple[int, ...],
    outputs: tuple[jax.ShapeDtypeStruct, ...],
    constants: dict[str, Any],
    *inputs: Any,
) -> tuple[np.ndarray, ...]:
    """The outputs of a kernel."""
    given = [np.ascontiguousarray(x) for x in inputs]
    found = [np.zeros(x.shape, x.dtype) for x in outputs]
    with _ALONE:
        interpreter.interpreter_builder.create_dot = _dot
        function(fn).run(*map(Pointer, (*given, *found)), grid=grid, warmup=False, **constants)
    return tuple(found)


def _dot(a: Any, b: Any, d: Any, precision: Any, imprecise: Any) -> Any:
    """A product of what Triton keeps as bits where numpy has no such numbers."""
    tl = interpreter.tl
    left, right = (
        interpreter._convert_float(x.data, x.dtype, tl.float32, None).view(np.float32)
        if x.dtype.scalar == tl.bfloat16
        else x.data.astype(np.float32)
        for x in (a, b)
    )
    return interpreter.TensorHandle(np.matmul(left, right) + d.data, d.dtype.scalar)
