"""The reader of the TPU compiler's dump, on the dump of a small kernel and on bundles written by hand.

The kernel, in `samples`, has a grid of four steps; a step loops three times over 16 rows, multiplies them by a matrix of
128 x 128, takes the power of two and then rolls the result five times.
"""

from pathlib import Path

import pytest

from delta_jax.compiled.core import CORES
from delta_jax.compiled.llo import Kernel, Loop, find_loops, parse_bundles, vmem_bytes

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
    kernel, core = sample(generation), CORES[generation]
    assert kernel.slots()["EUP"] == 3 * 2, "two registers of eight rows are raised in each trip"
    assert kernel.slots()["VSTORE:SPILL"] == 0
    busy = kernel.multiplying(core) * core.mxus * kernel.bundle_count
    assert busy == pytest.approx(3 * core.rows), "16 rows in each trip"


@pytest.mark.parametrize("generation", ["v5e", "tpu7x"])
def test_a_chain_of_waits(generation: str) -> None:
    kernel, core = sample(generation), CORES[generation]
    chain = 3 * (core.matmul + core.eup + 5 * core.permute)
    assert chain < kernel.cycles(core) < chain + kernel.bundle_count + 3 * 5 * core.lane


def test_pops_wait_for_their_operation() -> None:
    core = CORES["v5e"]
    matmul = by_hand("%1 = vmatmul.bf16.gmra.mxu0 %v1", *["%v2 = vpop.f32.mrf.mxu0"] * 2)
    assert matmul.cycles(core) == core.matmul + core.matmul_pop + 1
    eup = by_hand("%1 = vpow2.f32 %v1", "%2 = vpow2.f32 %v2", "%v3 = vpop.eup %2", "%v4 = vpop.eup %1")
    assert eup.cycles(core) == 1 + core.eup + 2
    permute = by_hand(
        "%1 = vperm.lane.xlu0 %2, %v1  ;;  %3 = vrot.lane.b32.xlu0 %v2, %s1", "%v4 = vpop.permute.xlu0 %3"
    )
    assert permute.cycles(core) == core.lane + core.permute + 1
    transpose = by_hand("%1 = vxpose.xlu1.b32.start.end [1/1] (short) %v1, 16", *["%v2 = vpop.trf.xlu1"] * 2)
    assert transpose.cycles(core) == core.transpose + core.lane + 1


def test_results_with_an_address_wait_for_the_last_write() -> None:
    core = CORES["tpu7x"]
    first, again = "%1 = vmatmul.mubr.bf16.gmra.mrb[4].mxu0 %v1", "%2 = vmatmul.mubr.bf16.gmra.mrb[4].mxu0 %v2"
    assert (
        by_hand(first, again, "%v3 = vpop.f32.mrb[6].mxu0").cycles(core)
        == core.rows + core.matmul + 2 * core.matmul_pop + 1
    )


def test_an_unreadable_loop_says_so() -> None:
    text = (SAMPLES / "v5e-bundles.txt").read_text().replace("scmp.ge.s32.totalorder", "scmp.eq.s32.totalorder")
    assert [loop.trips for loop in find_loops(parse_bundles(text))] == [None, None, None]


def test_a_loop_with_a_turn_more_in_the_first_grid_step_counts_that_of_the_others() -> None:
    text = """
     0   :  { %s1_s0 = scalar_select %p1_p0, 4294967295, 0 }
   0x1 LB: > { %s2_s1 = sphi %s1_s0, %s5_s1  ;;  %9 = sst [smem:[#allocation3_spill]] %s2_s1 }
   0x2   : > { %s3_s2 = sld [smem:[#allocation3_spill]] }
   0x3   : > { %s4_s3 = sadd.s32 1, %s3_s2 }
   0x4   : > { %p2_p1 = scmp.ge.s32.totalorder %s4_s3, 4  ;;  %s5_s1 = smov %s4_s3 }
"""
    assert find_loops(parse_bundles(text)) == [Loop(1, 5, 4)]
    assert find_loops(parse_bundles(text.replace("%s3_s2 }", "%s7_s2 }"))) == [Loop(1, 5, None)]


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
