"""The page of static schedules and its calibration, from rows as the compiling processes print them."""

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks.tpu_schedule import __main__ as command
from benchmarks.tpu_schedule import tokamax
from benchmarks.tpu_schedule.calibration import points
from benchmarks.tpu_schedule.page import page
from delta_jax.compiled.core import CORES


def row(implementation: str, cycles: int, around: int, *, segments: int = 0) -> dict[str, Any]:
    case = {"name": f"{implementation} KDA", "gate": "bounded", "tokens": 8192, "segments": segments}
    case |= {"key_heads": 32, "heads": 32, "key": 128, "value": 128, "dtype": "bfloat16"}
    units = ("MXU", "XLU", "VALU", "EUP", "VLOAD", "VSTORE")
    kernel = {"name": "rule", "grid": [8], "steps": 8, "bytes": 1000, "bundles": cycles // 16, "loops": []}
    kernel |= {"cycles": cycles // 8, "multiplying": 0.5, "occupancy": dict.fromkeys(units, 0.1)}
    kernel |= {"fills": 0, "spills": 0, "vmem_bytes": 2**20}
    whole = 1e3 * (cycles + around) / CORES["tpu7x"].clock
    milliseconds = {"estimate": 1.06 * whole, "least": 1.02 * whole, "most": 1.15 * whole, "kernels": 1.0}
    return {
        "generation": "tpu7x",
        "case": case,
        "implementation": implementation,
        "direction": "forward",
        "versions": {"jax": "1"},
        "kernels": [kernel],
        "around": {
            "instructions": 3,
            "cycles": around,
            "bytes": 10**9,
            "unestimated": {"gather": 2} if segments else {},
        },
        "milliseconds": milliseconds,
        "bytes_least": 10**8,
    }


def test_measured_over_predicted() -> None:
    clock = CORES["tpu7x"].clock
    fixed, packed = points(
        [
            row("tokamax", int(1e-3 * clock), int(0.5e-3 * clock)),
            row("tokamax", int(1e-3 * clock), 0, segments=25),
            row("pallas", 8, 8),
        ]
    )
    assert fixed["kernels"] == pytest.approx(1.0, rel=1e-3) and fixed["around"] == pytest.approx(0.5, rel=1e-3)
    assert (fixed["measured"], fixed["ratio"]) == (1.777, pytest.approx(1.777 / 1.5, rel=1e-3))
    assert (packed["measured"], packed["unestimated"]) == (3.942, 2)


def test_the_page_compares_whole_calls_beside_kernels_alone() -> None:
    rows = [row("pallas", 800_000, 1_600_000), row("tokamax", 1_600_000, 800_000)]
    result = {"date": "today", "command": "python -m x", "seconds": 1, "rows": rows, "left_out": {"tokamax": "reason"}}
    text = page(result)
    assert "| pallas KDA | forward | 1.53 | 3.05 | 6.10 | 1.156 (1.113 to 1.254) | 1.000 |" in text
    assert "| tpu7x | tokamax KDA over pallas KDA: forward | 2.00 | 2.00 | 1.00 |" in text
    assert "- tokamax: reason" in text


def test_what_cannot_be_compiled_is_left_out_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = [{"generation": "v5e"}]
    monkeypatch.setattr(command, "records", lambda *_: rows)
    monkeypatch.setattr(tokamax, "PYTHON", tmp_path / "python")
    found = command.collect(["v5e", "tpu7x"], Console(quiet=True))
    assert found["rows"] == 2 * rows
    assert found["left_out"] == {
        "tokamax on v5e": "its kernels ask for v6e or newer",
        "tokamax with 32 heads on tpu7x": "its environment is not built: make peers",
        "tokamax with 32 heads and 25 segments on tpu7x": "its environment is not built: make peers",
    }
