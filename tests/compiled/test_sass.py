"""The reader of GPU machine code, on what the compiler prints of a small kernel and on code written by hand.

The kernel, in `samples`, multiplies tiles of 64 x 64 in a loop of four turns, takes the power of two of their sum, and
multiplies that by one more.
"""

from pathlib import Path

import pytest

from delta_jax.compiled.jaxpr import Loop
from delta_jax.compiled.multiprocessor import DRAIN, LATENCY, START, WAITS, Multiprocessor
from delta_jax.compiled.sass import Program

SAMPLE = (Path(__file__).parent / "samples" / "sm_90a-output.txt").read_text()
TILE = 64**3
HOPPER = Multiprocessor(
    count=132,
    registers=65536,
    shared=228 * 1024,
    threads=2048,
    programs=32,
    multiply_adds=2048,
    clock=1e9,
    bandwidth=1e12,
)


def by_hand(*lines: str) -> Program:
    """Of lines of control codes, operation and operands."""
    return Program("\n".join("   {} /*0000*/ {} ;".format(*line.split(" ", 1)) for line in lines), 2048)


def test_a_loop_counts_as_often_as_the_jaxpr_says() -> None:
    program = Program(SAMPLE, 2048)
    (loop,) = program.loops
    assert loop.inner == () and sum(i.multiplies for i in program.code[loop.start : loop.stop]) == 4
    once, often = (program.total([Loop(trips, TILE, ())]) for trips in (1, 4))
    assert (once.multiply_adds, often.multiply_adds) == (2 * TILE, 5 * TILE)
    assert often.tensor == 5 * TILE / 2048
    assert often.shared - once.shared == 3 * TILE / 2048, "both operands lie in shared memory"
    written = 2 * 64 * 64 * 2 // 128
    assert often.shared == 5 * TILE / 2048 + written, "two tiles of bfloat16 are stored there"
    assert often.instructions - once.instructions == 3 * (loop.stop - loop.start)
    assert often.instructions < often.issue < often.estimated
    # Each turn waits for its own products.
    assert often.estimated - once.estimated > 3 * (TILE / 2048 + DRAIN)
    assert sum(i.operation.startswith("MUFU") for i in program.code) == 32, "64 x 64 powers of two by 128 threads"


def test_a_loop_that_takes_two_turns_at_once_and_one_that_was_written_out() -> None:
    program = Program(SAMPLE, 2048)
    whole = program.total([Loop(4, TILE, ())])
    assert program.total([Loop(8, TILE // 2, ())]) == whole
    assert program.total([Loop(3, TILE // 3, ()), Loop(4, TILE, ())]) == whole
    with pytest.raises(ValueError) as raised:
        program.total([Loop(4, TILE // 3, ())])
    assert "no loop of the jaxpr multiplies as those" in str(raised.value)


def test_what_waits_for_a_scoreboard_and_for_products() -> None:
    load = "-:-:0:Y:02 LDS R0, [R1]"
    use = "0:-:-:Y:05 FADD R0, R0, R0"
    alone = by_hand(load, use, "-:-:-:Y:01 EXIT").total([])
    assert alone.issue == 2 + 5 + 1
    assert alone.estimated == WAITS * LATENCY["LDS"] + 5 + 1
    product = "-:-:-:Y:01 HGMMA.64x128x16.F32.BF16 R24, R4, gdesc[UR8], R24, gsb0"
    wait = "-:-:-:Y:01 WARPGROUP.DEPBAR.LE gsb0, 0x0"
    total = by_hand(product, wait, "-:-:-:Y:01 EXIT").total([])
    assert (total.tensor, total.shared) == (64, 32), "one operand lies in registers"
    assert total.estimated == 64 + DRAIN + 2
    both = by_hand(product, product, wait.replace("0x0", "0x1"), "-:-:-:Y:01 EXIT").total([])
    assert both.estimated == total.estimated, "the second may still be under way"


def test_how_many_programs_fit_and_what_that_takes() -> None:
    assert HOPPER.together(168, 128, 64 * 1024) == (3, "registers")
    assert HOPPER.together(64, 128, 113 * 1024) == (2, "shared memory")
    assert HOPPER.together(64, 128, 114 * 1024) == (1, "shared memory"), "the system has a kilobyte of each"
    cost = {"together": 2, "cycles": 10_000.0 - START, "busy": 100.0, "memory_bytes": 0}
    assert HOPPER.milliseconds(programs=265, **cost) == (pytest.approx(2 * 0.01), "latency")
    assert HOPPER.milliseconds(programs=264 * 100, **cost) == (pytest.approx(100 * 0.01), "latency")
    busy = cost | {"busy": 9_000.0}
    assert HOPPER.milliseconds(programs=265, **busy) == (pytest.approx(3 * 0.009), "throughput")
    assert HOPPER.milliseconds(programs=265, **(cost | {"memory_bytes": 10**9}))[1] == "memory"
