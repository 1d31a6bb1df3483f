"""`python -m benchmarks.tpu_schedule.calibration`: static cycles against the times that others measured on their TPUs.

Compiles the workloads of tokamax's benchmark, for which its authors publish device times on a TPU7x, and prints what they
measured, what the cycles say, and the ratio. `Core.factor` and `Core.spread` in delta_jax.compiled.core are such ratios.
Points on v6e come from kernels of sglang-jax whose compiled form depends on an older libtpu; they are not recompiled here.
"""

import argparse
import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console

from benchmarks.report import table
from benchmarks.tpu_schedule.tokamax import WORKLOADS, tokamax_rows
from delta_jax.compiled.core import CORES

Row = dict[str, Any]

MEASURED = {
    (0, "forward"): 1.777,
    (0, "forward_backward"): 4.593,
    (25, "forward"): 3.942,
    (25, "forward_backward"): 8.810,
}
"""(segments, direction) -> milliseconds on TPU7x that tokamax's authors give for 32 heads and 8192 tokens (its PR 1103)."""


def points(rows: Iterable[Row]) -> list[Row]:
    """Measured and predicted milliseconds of every row that somebody has measured; no factor is in the prediction."""
    found = []
    for row in rows:
        case = row["case"]
        measured = MEASURED.get((case.get("segments", 0), row["direction"]))
        if (
            row["implementation"] != "tokamax"
            or row["generation"] != "tpu7x"
            or case["heads"] != 32
            or measured is None
        ):
            continue
        milliseconds = 1e3 / CORES[row["generation"]].clock
        kernels = milliseconds * sum(kernel["cycles"] * kernel["steps"] for kernel in row["kernels"])
        around = milliseconds * row["around"]["cycles"]
        found.append(
            {
                "workload": f"{case['name']}, {row['direction'].replace('_', ' + ')}",
                "measured": measured,
                "kernels": kernels,
                "around": around,
                "ratio": measured / (kernels + around),
                "unestimated": sum(row["around"]["unestimated"].values()),
            }
        )
    return found


def calibration(rows: Iterable[Row]) -> str:
    """The points as a table; "" where there are none."""
    lines = [
        [
            point["workload"],
            f"{point['measured']:.3f}",
            f"{point['kernels'] + point['around']:.3f}",
            f"{point['kernels']:.3f}",
            f"{point['around']:.3f}",
            f"{point['ratio']:.2f}",
            str(point["unestimated"]),
        ]
        for point in points(rows)
    ]
    head = ["TPU7x, milliseconds", "measured", "predicted", "kernels", "around", "measured / predicted"]
    return table([*head, "instructions without an estimate"], lines) if lines else ""


def main() -> None:
    """Compile and print; exit code 1 where no point could be checked."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tpu_schedule.calibration", description=__doc__.splitlines()[0]
    )
    parser.parse_args()
    rows, left_out = tokamax_rows("tpu7x", WORKLOADS, Console(stderr=True))
    if text := calibration(rows):
        print(text)
    for name, reason in left_out.items():
        print(f"left out: {name}: {reason}")
    sys.exit(0 if rows else 1)


if __name__ == "__main__":
    main()
