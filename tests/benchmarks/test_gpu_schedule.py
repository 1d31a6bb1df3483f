"""What the compiler for GPUs prints, and the page that is made of it."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.gpu_schedule import compiler, published
from benchmarks.gpu_schedule.page import calls, errors, kernels
from benchmarks.gpu_schedule.shapes import CASES
from delta_jax.compiled.sass import Program

SAMPLE = (Path(__file__).parents[1] / "compiled" / "samples" / "sm_90a-output.txt").read_text()
REPORT = (
    "ptxas info    : (C7514) Potential Performance Loss: wgmma.mma_async instructions are serialized due to reasons\n"
)


def test_a_kernel_is_read_from_what_the_compiler_prints() -> None:
    (kernel,) = compiler.read_output(SAMPLE)
    assert (kernel.name, kernel.target) == ("powers", "sm_90a")
    assert kernel.number(r"Used (\d+) registers") == 58
    assert kernel.warnings == ["C7519"] and kernel.serialised == []
    two = list(compiler.read_output(SAMPLE + REPORT + SAMPLE.replace("powers", "others")))
    assert [found.name for found in two] == ["powers", "others"]
    assert [found.serialised for found in two] == [[], ["C7514"]]
    assert two[0].code.strip() == two[1].code.replace("others", "powers").strip() == kernel.code.strip()
    assert list(compiler.read_output("")) == []


def test_kernels_are_matched_with_what_was_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "_PRINTED", {})
    call, other = (SimpleNamespace(name="powers", equation=f"the {kind} one") for kind in ("first", "second"))
    ((found, shared, printed),) = compiler.matched([call], SAMPLE, (9, 0))  # type: ignore[list-item]
    assert found is call and shared == 65536 and printed.name == "powers"
    again = "Resources(smem_scratch_bytes=65536, )\n"
    ((*_, same),) = compiler.matched([call], again, (9, 0))  # type: ignore[list-item]
    assert same == printed, "equal kernels are compiled once"
    for traced, text in (([other], again), ([call], again * 2), ([call], SAMPLE)):
        with pytest.raises(ValueError):
            list(compiler.matched(traced, text, (9, 0)))  # type: ignore[arg-type]


def test_control_codes_of_machine_code_that_is_listed_with_its_bits() -> None:
    listed = """.L_x_1:
        /*0010*/                   S2UR UR12, SR_CTAID.X ;      /* 0x00000000000c79c3 */
                                                                /* 0x000e620000002500 */
        /*00c0*/              @!P0 LDGSTS.E [R5], [R6.64] ;     /* 0x0000000006057fae */
                                                                /* 0x004fe8000b98c512 */
"""
    first, second = "-:-:1:Y:1 /*0010*/ S2UR UR12, SR_CTAID.X ;", "2:-:-:Y:4 /*00c0*/ @!P0 LDGSTS.E [R5], [R6.64] ;"
    assert list(published.control_codes(listed)) == [".L_x_1:", f" {first}", f" {second}"]
    instructions = Program("\n".join(published.control_codes(listed)) + "\n -:-:-:Y:5 /*00d0*/ EXIT ;", 2048).code
    assert [(i.waits, i.sets, i.stall, i.operation) for i in instructions] == [
        ((), (1,), 1, "S2UR"),
        ((2,), (), 4, "LDGSTS.E"),
        ((), (), 5, "EXIT"),
    ]
    assert [i.label for i in instructions] == [".L_x_1", None, None]


def test_the_tables() -> None:
    kernel = {
        "name": "delta_rule_prepare",
        "programs": 4096,
        "threads": 128,
        "registers": 168,
        "spill_stores": 8,
        "shared_bytes": 65536,
        "together": 3,
        "limit": "registers",
        "serialised": ["C7514"],
        "issue": 4000,
        "cycles": 9000.4,
        "tensor": 1632.0,
        "shared": 2448,
        "bytes": 2e8,
        "milliseconds": 0.1,
        "sets": "latency",
    }
    case = next(case for case in CASES if case.name == "Kimi Linear")
    row = {"chip": "h200", "case": {"name": case.name}, "call": "forward", "kernels": [kernel], "milliseconds": 0.1}
    row |= {"bytes": 2e8, "bytes_least": 1e8, "temporary_bytes": 0, "seconds": 3}
    assert calls([row]).splitlines()[-1] == "| Kimi Linear, forward | 0.100 | 1 | 200 | 100 | 2.0 | 0 | 3 |"
    line = kernels([row]).splitlines()[-1]
    assert (
        "| 4096 x 128 | 168 | 8 | 64 | 3 (registers) | C7514 | 4000 | 9000 | 1632 | 2448 | 200 | 0.100 | latency |"
        in line
    )
    assert errors([row]).endswith("| 0.469 | 0.100 | 4.69 |")
    assert errors([row | {"chip": "h100"}]) == ""
