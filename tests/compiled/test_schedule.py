"""The schedule of a program: its kernels by a dump, the rest by the compiler's estimates, and both as seconds."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from delta_jax.compiled.core import CORES
from delta_jax.compiled.jaxpr import KernelCall, kernel_calls
from delta_jax.compiled.llo import Kernel
from delta_jax.compiled.schedule import schedule_of

SAMPLES = Path(__file__).parent / "samples"
PROGRAM = """HloModule jit_step

ENTRY %main (a: f32[64,128]) -> f32[64,128] {
  %a = f32[64,128]{1,0} parameter(0)
  %rule.1 = f32[64,128]{1,0} custom-call(%a), custom_call_target="tpu_custom_call"
  %rule.2 = f32[64,128]{1,0} custom-call(%rule.1), custom_call_target="tpu_custom_call"
  %rule.3 = f32[32,128]{1,0} custom-call(%rule.2), custom_call_target="tpu_custom_call"
  ROOT %tanh.1 = f32[64,128]{1,0} tanh(%rule.2), backend_config={"estimated_cycles":"5000"}
}
"""


def calls(rows: int, semantics: tuple[str, ...] = ("parallel",), columns: int = 128) -> list[KernelCall]:
    def body(x: jax.Array, out: jax.Array) -> None:
        out[...] = x[...]

    block = pl.BlockSpec((16, columns), lambda i: (i, 0))
    shape = jax.ShapeDtypeStruct((rows, columns), jnp.float32)
    call = pl.pallas_call(
        body,
        shape,
        grid=(rows // 16,),
        in_specs=[block],
        out_specs=block,
        name="rule",
        compiler_params=pltpu.CompilerParams(dimension_semantics=semantics),
    )
    return list(kernel_calls(jax.make_jaxpr(call)(shape)))


@pytest.fixture
def dump(tmp_path: Path) -> Path:
    """What the compiler writes of a kernel, beside files of no interest."""
    for part, kind in (("01-final_hlo-static-per-bundle-utilization", "utilization"), ("03-final_bundles", "bundles")):
        (tmp_path / f"17-rule.1-{part}.txt").write_text((SAMPLES / f"v5e-{kind}.txt").read_text())
        (tmp_path / f"17-<late-initialization>-{part}.txt").write_text("")
    (tmp_path / "17-rule.1-02-schedule-analysis_final_bundles.txt").write_text("")
    return tmp_path


def test_kernels_count_by_their_grids_and_equal_ones_are_written_once(dump: Path) -> None:
    core = CORES["v5e"]
    found = schedule_of(PROGRAM, calls(64) + calls(32), dump, core)
    texts = [(SAMPLES / f"v5e-{kind}.txt").read_text() for kind in ("bundles", "utilization")]
    step = Kernel(*texts, gridded=True).cycles(core)
    assert {name: run.cycles for name, run in found.kernels.items()} == {"rule.1": 4 * step, "rule.2": 4 * step}
    assert found.unread == ("rule.3",), "no bundles of its shape were written"
    assert (found.work.cycles, found.cycles) == (5000, 5000 + 8 * step)
    assert found.seconds(core.clock) == core.factor and core.clock == pytest.approx(1.5e9, rel=0.01)
    assert found.spread == (0.90 / 1.05, 1.20 / 1.05)


def test_a_kernel_takes_no_less_than_its_traffic(dump: Path) -> None:
    large = PROGRAM.replace("64,128]", "64,128000]")
    found = schedule_of(large, calls(64, columns=128000), dump, CORES["v5e"])
    seconds = 2 * 2 * 64 * 128000 * 4 / 819e9
    assert found.kernel_cycles / CORES["v5e"].clock == pytest.approx(seconds)


def test_what_a_grid_does_not_visit_of_an_operand_does_not_move(dump: Path) -> None:
    """As of the states of all layers, of which a step reads and writes one."""
    large = PROGRAM.replace("64,128]", "64,128000]")
    part = [call._replace(results=((64, 128000),)) for call in calls(64)]
    found = schedule_of(large, part, dump, CORES["v5e"])
    assert {run.memory_cycles for run in found.kernels.values()} == {CORES["v5e"].memory_cycles(2 * 64 * 128 * 4)}


def test_two_cores_of_one_device_share_the_steps_of_a_parallel_axis(dump: Path) -> None:
    for semantics, steps in ((("parallel",), 2), (("arbitrary",), 4)):
        found = schedule_of(PROGRAM, calls(64, semantics), dump, CORES["v5p"])
        assert {run.steps for run in found.kernels.values()} == {steps}


def test_without_a_dump_every_kernel_is_named(tmp_path: Path) -> None:
    found = schedule_of(PROGRAM, calls(64), tmp_path, CORES["v6e"])
    assert found.kernel_cycles == 0
    assert found.unread == ("rule.1", "rule.2", "rule.3") and found.cycles == 5000
