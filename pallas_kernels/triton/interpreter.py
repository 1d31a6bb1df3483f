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
    """A product as a GPU makes it: of TF32 what the multipliers see, or as three such products."""
    kinds = interpreter._ir.INPUT_PRECISION
    left, right = a.data, b.data
    if precision == kinds.TF32x3:
        high, other = _tf32(left, 0x1000), _tf32(right, 0x1000)  # rounded, not cut off
        product = high @ other + high @ _tf32(right - other) + _tf32(left - high) @ other
    else:
        product = left @ right if precision == kinds.IEEE else _tf32(left) @ _tf32(right)
    return interpreter.TensorHandle(product + d.data, d.dtype.scalar)


def _tf32(x: np.ndarray, added: int = 0) -> np.ndarray:
    """The eleven bits of a number that TF32 multiplies."""
    bits = (x.view(np.uint32) + np.uint32(added)) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(x), bits.view(np.float32), x)
