"""What holds an implementation of the op to its definition: the family, hard inputs, the recurrence in float64.

For whoever writes a kernel: `problem` draws a member's inputs, `evaluate` runs an op on them, forward and backward,
`reference` is the recurrence in float64, `relative_error` and `beyond_rounding` say how far they are apart.
"""

from delta_jax.testing.comparison import beyond_rounding, evaluate, reference, relative_error, rounded
from delta_jax.testing.members import HARD, MEMBERS, draw, op_of, problem, step_of
from delta_jax.testing.trials import (
    TRIALS,
    Trial,
    interpreted_gpu,
    interpreted_tpu,
    interpreted_triton,
    xla_of_accelerators,
)

__all__ = [
    "HARD",
    "MEMBERS",
    "TRIALS",
    "Trial",
    "beyond_rounding",
    "draw",
    "evaluate",
    "interpreted_gpu",
    "interpreted_tpu",
    "interpreted_triton",
    "op_of",
    "problem",
    "reference",
    "relative_error",
    "rounded",
    "step_of",
    "xla_of_accelerators",
]
