"""Registers of a value, taken as they lie for those of another layout: what Mosaic GPU has no name for."""

from typing import Any

import numpy as np
from jax.experimental.mosaic.gpu import fragmented_array, utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm


def moved(value: Any, layout: Any) -> Any:
    """An accumulator of a product, rounded to 16 bits, as a left operand of "mma", which lies in the same registers."""
    i32 = ir.IntegerType.get_signless(32)

    def move(register: Any) -> Any:
        """MLIR would fold two bitcasts, and the layout with them; ptxas folds this."""
        bits = llvm.inline_asm(i32, [utils.bitcast(register, i32)], "mov.b32 $0, $1;", "=r,r")
        return utils.bitcast(bits, register.type)

    registers = np.asarray([move(register) for register in value.registers.flat], dtype=object)
    registers = registers.reshape(layout.registers_shape(value.shape))
    return fragmented_array.FragmentedArray(_registers=registers, _layout=layout, _is_signed=value.is_signed)
