"""Traffic between a device and its memory, against programs whose figures are known."""

import jax
import jax.numpy as jnp

from delta_jax.compiled.traffic import memory_bytes


def _traffic(function: object, *arguments: jax.Array) -> float:
    return memory_bytes(jax.jit(function).lower(*arguments).compile().as_text())  # type: ignore[arg-type]


def test_memory_traffic_is_operands_and_results() -> None:
    x, y = jnp.ones((1000, 100)), jnp.ones((1000, 100))
    assert _traffic(lambda x, y: x + y, x, y) == 3 * 400_000
    assert _traffic(lambda x: x[:, :50] * 2, x) == 2 * 200_000  # what is sliced away is not read


def test_memory_traffic_of_a_loop_over_slices_is_that_of_its_slices() -> None:
    """A loop that reads 20 matrices one by one and writes 20 rows reads each once, not all of them 20 times."""
    matrices, x = jnp.ones((20, 200, 200)), jnp.ones((1, 200))

    def loop(x: jax.Array, matrices: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, w: ((x @ w) * 0.1, x), x, matrices)[1]

    assert 4 * matrices.size < _traffic(loop, x, matrices) < 3.2 * 4 * matrices.size


def test_memory_traffic_leaves_out_what_lies_in_a_faster_memory() -> None:
    hlo = """HloModule m

%fused (p.0: f32[4,8], p.1: s32[]) -> f32[1,8] {
  %p.0 = f32[4,8]{1,0:T(8,128)} parameter(0)
  %p.1 = s32[]{:T(128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  ROOT %slice = f32[1,8]{1,0:T(8,128)} dynamic-slice(%p.0, %p.1, %zero), dynamic_slice_sizes={1,8}
}

ENTRY %main (a: f32[4,8], i: s32[]) -> f32[1,8] {
  %a = f32[4,8]{1,0:T(8,128)} parameter(0)
  %i = s32[]{:T(128)} parameter(1)
  %start = (f32[4,8]{1,0:T(8,128)S(1)}, f32[4,8]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%a)
  %near = f32[4,8]{1,0:T(8,128)S(1)} copy-done(%start)
  %kernel = (f32[4,8]{1,0:T(8,128)}, f32[4,8]{1,0:T(8,128)S(1)}) custom-call(%a, %near), custom_call_target="kernel"
  %far = f32[4,8]{1,0:T(8,128)} get-tuple-element(%kernel), index=0
  ROOT %fusion = f32[1,8]{1,0:T(8,128)} fusion(%far, %i), kind=kLoop, calls=%fused
}
"""
    # The copy reads 128 bytes, the kernel reads and writes 128, the fusion reads 32 and a number, and writes 32.
    assert memory_bytes(hlo) == 128 + 2 * 128 + 32 + 4 + 32
