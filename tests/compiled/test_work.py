"""The kinds of a program's work and their cycles, on a text such as the TPU compiler writes."""

from collections import Counter

import jax
import jax.numpy as jnp

from delta_jax.compiled.work import Kind, work_of

PROGRAM = """HloModule jit_step, is_scheduled=true

%fused_product (p: bf16[8,16], w: bf16[16,16]) -> bf16[8,16] {
  %p = bf16[8,16]{1,0} parameter(0)
  %w = bf16[16,16]{1,0} parameter(1)
  %convolution.1 = bf16[8,16]{1,0} convolution(%p, %w), dim_labels=bf_io->bf
  ROOT %negate.1 = bf16[8,16]{1,0} negate(%convolution.1)
}

%outer_product (p.1: bf16[8,16], w.1: bf16[16,16]) -> bf16[8,16] {
  %p.1 = bf16[8,16]{1,0} parameter(0)
  %w.1 = bf16[16,16]{1,0} parameter(1)
  ROOT %fusion.9 = bf16[8,16]{1,0} fusion(%p.1, %w.1), kind=kOutput, calls=%fused_product
}

%fused_turn (p.2: bf16[8,16]) -> bf16[16,8] {
  %p.2 = bf16[8,16]{1,0} parameter(0)
  ROOT %transpose.1 = bf16[16,8]{0,1} transpose(%p.2), dimensions={1,0}
}

%fused_gather (p.3: bf16[2,16]) -> bf16[8,16] {
  %p.3 = bf16[2,16]{1,0} parameter(0)
  ROOT %all-gather.1 = bf16[8,16]{1,0} all-gather(%p.3), channel_id=7, replica_groups=[1,4]<=[4], dimensions={0}
}

%body (t: bf16[8,16]) -> bf16[8,16] {
  %t = bf16[8,16]{1,0} parameter(0)
  %weights = bf16[16,16]{1,0} constant({...})
  %fusion.1 = bf16[8,16]{1,0} fusion(%t, %weights), kind=kOutput, calls=%outer_product, backend_config={"estimated_cycles":"100"}
  %rule.1 = bf16[8,16]{1,0} custom-call(%fusion.1), custom_call_target="tpu_custom_call"
  %copy.1 = bf16[8,16]{0,1} copy(%rule.1), backend_config={"estimated_cycles":"7"}
  ROOT %turned = bf16[16,8]{0,1} fusion(%copy.1), kind=kLoop, calls=%fused_turn, backend_config={"estimated_cycles":"8"}
}

%condition (t.1: bf16[8,16]) -> pred[] {
  %bound = s32[]{:T(128)} constant(24)
  ROOT %lt = pred[]{:T(512)} compare(%i, %bound), direction=LT
}

%repair (f: (pred[], bf16[8,16])) -> (pred[], bf16[8,16]) {
  %f = (pred[], bf16[8,16]{1,0}) parameter(0)
  ROOT %slow = (pred[], bf16[8,16]{1,0}) add(%f, %f), backend_config={"estimated_cycles":"1000000"}
}

%flag (f.1: (pred[], bf16[8,16])) -> pred[] {
  %f.1 = (pred[], bf16[8,16]{1,0}) parameter(0)
  ROOT %pending = pred[]{:T(512)} get-tuple-element(%f.1), index=0
}

ENTRY %main (a: bf16[8,16], b: bf16[2,16]) -> bf16[8,16] {
  %a = bf16[8,16]{1,0} parameter(0)
  %b = bf16[2,16]{1,0} parameter(1)
  %copy-start.1 = (bf16[8,16]{1,0:S(1)}, bf16[8,16]{1,0}, u32[]{:S(2)}) copy-start(%a)
  %copy-done.1 = bf16[8,16]{1,0:S(1)} copy-done(%copy-start.1)
  %room = bf16[8,16]{1,0} custom-call(), custom_call_target="AllocateBuffer"
  %while.1 = bf16[8,16]{1,0} while(%copy-done.1), condition=%condition, body=%body
  %while.2 = (pred[], bf16[8,16]{1,0}) while(%while.1), condition=%flag, body=%repair
  %fusion.2 = bf16[8,16]{1,0} fusion(%b), kind=kCustom, calls=%fused_gather, backend_config={"estimated_cycles":"50"}
  %sparse = bf16[8,16]{1,0} custom-call(%fusion.2), custom_call_target="SparseGather"
  %call-start.1 = ((bf16[8,16]{1,0}), bf16[8,16]{0,1}, u32[]{:S(8)}) call-start(%sparse), async_execution_thread="sparsecore"
  %call-done.1 = bf16[8,16]{0,1} call-done(%call-start.1)
  %reverse.1 = bf16[8,16]{1,0} reverse(%call-done.1), dimensions={0}
  ROOT %tanh.1 = bf16[8,16]{1,0} tanh(%reverse.1), backend_config={"estimated_cycles":"20"}
}
"""  # noqa: E501


def test_kinds_count_as_often_as_they_run() -> None:
    work = work_of(PROGRAM)
    one = 8 * 16 * 2
    assert work.products == Kind(runs=24, cycles=2400, bytes=24 * (2 * one + 16 * 16 * 2))
    assert work.collectives == Kind(runs=1, cycles=50, bytes=one + one // 4)
    assert work.ahead == Kind(runs=1, cycles=0, bytes=one), "it writes into a faster memory"
    assert work.copies == 24 * 2, "a copy, and a fusion that only transposes"
    assert (work.others.runs, work.others.cycles) == (24 * 2 + 4, 24 * (7 + 8) + 20)
    assert work.cycles == 2400 + 50 + 24 * 15 + 20


def test_what_has_no_estimate_is_counted_by_name() -> None:
    work = work_of(PROGRAM)
    assert work.kernels == {"rule.1": Kind(runs=24, bytes=24 * 2 * 8 * 16 * 2)}
    assert work.unestimated == Counter({"SparseGather": 1, "sparsecore call-start": 1, "reverse": 1})


def test_a_loop_that_a_flag_decides_makes_up_for_what_is_not_finite_and_does_not_run() -> None:
    assert work_of(PROGRAM).cycles < 1_000_000
    compared = PROGRAM.replace("get-tuple-element(%f.1), index=0", "compare(%f.1, %f.1), direction=LT")
    assert work_of(compared).cycles > 1_000_000, "a bound that cannot be read counts once"


def test_a_scope_is_told_apart_with_the_loops_inside() -> None:
    def op(x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda carry, row: (carry + jnp.sin(row), carry * row), x[0], x)[1]

    def layer(x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.cos(jax.jit(op)(x @ w))

    x, w = jnp.ones((40, 16)), jnp.ones((16, 16))
    text = jax.jit(layer).lower(x, w).compile().as_text() or ""
    whole, work = work_of(text), work_of(text, apart="jit(op)")
    assert work.products == whole.products and work.products.bytes == 4 * (2 * x.size + w.size)
    assert work.others.bytes == 2 * 4 * x.size, "the cosine"
    assert work.apart.bytes >= 2 * 4 * x.size and work.apart.runs >= 40
