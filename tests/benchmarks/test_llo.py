"""The reader of the TPU compiler's dump, on the dump of a small kernel and on bundles written by hand.

The kernel, in `samples`, has a grid of four steps; a step loops three times over 16 rows, multiplies them by a matrix of
128 x 128, takes the power of two and then rolls the result five times.
"""

from pathlib import Path

import pytest

from benchmarks.tpu_schedule.chips import CHIPS
from benchmarks.tpu_schedule.hlo import around
from benchmarks.tpu_schedule.llo import Kernel, Loop, find_loops, parse_bundles, vmem_bytes

SAMPLES = Path(__file__).parent / "samples"
UTILIZATION = "== CAPACTIY:\nMXU, XLU\n    4     3\n== UTILIZATION:\n"


def sample(generation: str) -> Kernel:
    bundles, utilization = (SAMPLES / f"{generation}-{kind}.txt" for kind in ("bundles", "utilization"))
    return Kernel(bundles.read_text(), utilization.read_text(), gridded=True)


def by_hand(*bundles: str) -> Kernel:
    text = "\n".join(f"  {hex(i) if i else '0'}   :  {{ {bundle} }}" for i, bundle in enumerate(bundles))
    return Kernel(text, UTILIZATION + "0 0\n" * len(bundles), gridded=False)


@pytest.mark.parametrize("generation", ["v5e", "tpu7x"])
def test_loops_count_by_their_trips(generation: str) -> None:
    kernel = sample(generation)
    outer, inner = kernel.loops
    assert (outer.trips, inner.trips) == (3, 5)
    assert outer.start < inner.start < inner.stop <= outer.stop
    sizes = kernel.listed, outer.stop - outer.start, inner.stop - inner.start
    assert kernel.bundle_count == sizes[0] + 2 * sizes[1] + 3 * 4 * sizes[2]


@pytest.mark.parametrize("generation", ["v5e", "tpu7x"])
def test_slots_are_those_of_the_kernel(generation: str) -> None:
    kernel, chip = sample(generation), CHIPS[generation]
    assert kernel.slots()["EUP"] == 3 * 2, "two registers of eight rows are raised in each trip"
    assert kernel.slots()["VSTORE:SPILL"] == 0
    busy = kernel.multiplying(chip) * chip.mxus * kernel.bundle_count
    assert busy == pytest.approx(3 * chip.rows), "16 rows in each trip"


@pytest.mark.parametrize("generation", ["v5e", "tpu7x"])
def test_a_chain_of_waits(generation: str) -> None:
    kernel, chip = sample(generation), CHIPS[generation]
    chain = 3 * (chip.matmul + chip.eup + 5 * chip.permute)
    assert chain < kernel.cycles(chip) < chain + kernel.bundle_count + 3 * 5 * chip.lane


def test_pops_wait_for_their_operation() -> None:
    chip = CHIPS["v5e"]
    matmul = by_hand("%1 = vmatmul.bf16.gmra.mxu0 %v1", *["%v2 = vpop.f32.mrf.mxu0"] * 2)
    assert matmul.cycles(chip) == chip.matmul + chip.matmul_pop + 1
    eup = by_hand("%1 = vpow2.f32 %v1", "%2 = vpow2.f32 %v2", "%v3 = vpop.eup %2", "%v4 = vpop.eup %1")
    assert eup.cycles(chip) == 1 + chip.eup + 2
    permute = by_hand(
        "%1 = vperm.lane.xlu0 %2, %v1  ;;  %3 = vrot.lane.b32.xlu0 %v2, %s1", "%v4 = vpop.permute.xlu0 %3"
    )
    assert permute.cycles(chip) == chip.lane + chip.permute + 1
    transpose = by_hand("%1 = vxpose.xlu1.b32.start.end [1/1] (short) %v1, 16", *["%v2 = vpop.trf.xlu1"] * 2)
    assert transpose.cycles(chip) == chip.transpose + chip.lane + 1


def test_results_with_an_address_wait_for_the_last_write() -> None:
    chip = CHIPS["tpu7x"]
    first, again = "%1 = vmatmul.mubr.bf16.gmra.mrb[4].mxu0 %v1", "%2 = vmatmul.mubr.bf16.gmra.mrb[4].mxu0 %v2"
    assert (
        by_hand(first, again, "%v3 = vpop.f32.mrb[6].mxu0").cycles(chip)
        == chip.rows + chip.matmul + 2 * chip.matmul_pop + 1
    )


def test_an_unreadable_loop_says_so() -> None:
    text = (SAMPLES / "v5e-bundles.txt").read_text().replace("scmp.ge.s32.totalorder", "scmp.eq.s32.totalorder")
    assert [loop.trips for loop in find_loops(parse_bundles(text))] == [None, None, None]


def test_empty_bundles_and_comments() -> None:
    bundles = parse_bundles(
        "     0   :  {} /* Start\nregion */\n   0x1 LB: > { %s1 = smov 0 /* } ;; */  ;;  %2 = sst [%s1] }\n   0x2   :  {}\n"
    )
    assert [len(bundle.operations) for bundle in bundles] == [0, 2, 0]
    assert find_loops(bundles) == [Loop(1, 2, None)]


def test_rows_must_match_bundles() -> None:
    with pytest.raises(ValueError) as error:
        Kernel("     0   :  {}\n", UTILIZATION, gridded=False)
    assert "1 bundles have 0 rows" in str(error.value)


def test_vmem_is_the_sum_of_the_allocations() -> None:
    line = "#allocation{} [shape = 'u8[{}]{{0}}', space={}, size = {}, scoped, tag = 'x']\n"
    text = (
        line.format(2, 4096, "vmem", "0x1000")
        + line.format(3, 4, "smem", "0x4")
        + line.format("5_spill", 8, "vmem", "0x8")
    )
    assert vmem_bytes(text + text) == 0x1008


def test_instructions_of_a_while_loop_count_by_its_trips() -> None:
    text = """HloModule sample

%fused_computation (x: f32[8]) -> f32[8] {
  ROOT %add.1 = f32[8]{0} add(%x, %x)
}

%body (x: f32[8]) -> f32[8] {
  %fusion.1 = f32[8]{0} fusion(%x), kind=kLoop, calls=%fused_computation
  ROOT %fusion.2 = f32[8]{0} fusion(%fusion.1), kind=kLoop, calls=%fused_computation
}

%condition (x: f32[8]) -> pred[] {
  %constant.1 = s32[] constant(64)
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %while.1 = f32[8]{0} while(%x), condition=%condition, body=%body
  %kernel.1 = f32[8]{0} custom-call(%while.1), custom_call_target="tpu_custom_call"
  ROOT %copy.1 = f32[8]{0} copy(%kernel.1)
}
"""
    bundles = {count: "".join(f"  {hex(i)}   :  {{}}\n" for i in range(1, count + 1)) for count in (3, 5, 100)}
    programs = {
        name: (bundles[count], UTILIZATION + "0 0\n" * count, 0)
        for name, count in {"fusion.1": 3, "copy.1": 5, "kernel.1": 100}.items()
    }
    assert around(programs, text, ["kernel.1"]) == {"bundles": 64 * (3 + 3) + 5, "instructions": 3, "unread": 0}
    del programs["fusion.1"]
    assert around(programs, text, ["kernel.1"]) == {"bundles": 5, "instructions": 3, "unread": 2}
