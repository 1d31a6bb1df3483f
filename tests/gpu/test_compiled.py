"""What ptxas makes of the kernels: nothing spilled, no products that wait for each other, for every kind of gate and of GPU.

The compiler lies in an environment of its own, `.venv-gpu`, which `make test` makes; one process of it compiles everything.
"""

import functools
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".venv-gpu" / "bin" / "python"
# One for every generation that the kernels are made for: copies by threads and by a unit of their own, with much shared
# memory and with little.
CHIPS = ("h100", "a100", "rtx4090", "b200", "rtxpro6000")
GATES = ("none", "head", "channel")
CALLS = ("forward_kept", "backward", "step")  # a forward that keeps nothing is the same kernels, with less

# Bytes of registers that a thread stores because there was no room, at most, by gate and kernel.
SPILLS = {
    # The scores and the levels of the decays lie in registers together, 255 of which a thread has.
    ("channel", "delta_rule_prepare"): 16,
    # Five cotangents of a block beside the levels of the decays.
    ("channel", "delta_rule_gradients"): 200,
}
# Where products are of registers, a state and its update have half of them, and operands that a "wgmma" would read from
# shared memory want 64 more.
SPILLS_OF_REGISTERS = {
    "delta_rule_forward": 480,
    "delta_rule_reverse": 340,
    "delta_rule_prepare": 90,
    "delta_rule_gradients": 250,
}
# What ptxas may say of products of warpgroups: C7519, that it fences the registers of a left operand by itself.
HARMLESS = {"C7519"}

SCRIPT = """
import json, sys
from benchmarks.gpu_schedule.compiler import schedule, traced_for
from benchmarks.gpu_schedule.shapes import Case, call_of
chip, calls, found = sys.argv[1], sys.argv[2].split(","), []
for gate in sys.argv[3:]:
    case = Case(name=gate, gate=gate, tokens=128, key_heads=1, heads=2, decode_batch=1)
    for call in calls:
        with traced_for(chip):
            function, arguments, _ = call_of(case, call)
        found.append({"gate": gate, "call": call, **schedule(function, arguments, chip)})
print(json.dumps(found))
"""

each_chip = pytest.mark.parametrize("chip", [pytest.param(chip, marks=pytest.mark.xdist_group(chip)) for chip in CHIPS])
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (ROOT / ".venv-gpu" / "installed").exists(),
        reason="the compiler for GPUs, in .venv-gpu (make .venv-gpu/installed), is not installed",
    ),
]


@functools.cache
def compiled(chip: str) -> list[dict[str, Any]]:
    command = [str(PYTHON), "-c", SCRIPT, chip, ",".join(CALLS), *GATES]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    assert done.returncode == 0, done.stderr[-2000:]
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


def kernels(chip: str, gate: str, call: str) -> list[dict[str, Any]]:
    (found,) = (row["kernels"] for row in compiled(chip) if (row["gate"], row["call"]) == (gate, call))
    return found  # type: ignore[no-any-return]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("gate", GATES)
@each_chip
def test_what_the_compiler_says(chip: str, gate: str, call: str) -> None:
    for kernel in kernels(chip, gate, call):
        assert kernel["serialised"] == [], kernel["name"]
        assert set(kernel["warnings"]) <= HARMLESS, kernel["name"]
        spills = SPILLS_OF_REGISTERS.get(kernel["name"], 0) if chip != "h100" else SPILLS.get((gate, kernel["name"]), 0)
        assert kernel["spill_stores"] <= spills, kernel["name"]
        assert kernel["together"] >= 1, kernel["name"]


@each_chip
def test_machine_code_multiplies_what_the_jaxpr_does(chip: str) -> None:
    """So loops were told apart, and run as often as they are taken to.

    Of products of registers the compiler leaves out some of which nothing is read, and may take a turn of two apart.
    """
    rows = compiled(chip)
    assert {"delta_rule_prepare", "delta_rule_forward"} <= {kernel["name"] for kernel in rows[0]["kernels"]}
    for row in rows:
        for kernel in row["kernels"]:
            in_code, in_jaxpr = kernel["multiply_adds"]
            assert in_code == in_jaxpr if chip == "h100" else 0.5 * in_jaxpr <= in_code <= in_jaxpr, kernel["name"]
            assert kernel["cycles"] > kernel["issue"] > kernel["instructions"]
        assert row["kernels"] and (row["call"] == "step") == (row["kernels"][0]["multiply_adds"][0] == 0)
