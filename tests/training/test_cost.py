"""FLOPs and exchanged bytes, against programs whose figures are known."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import PartitionSpec as P

from delta_jax.compiled.jaxpr import Loop, kernel_calls
from delta_jax.parallel import MeshConfig, make_mesh
from delta_jax.training.cost import collective_bytes, product_flops
from pallas_kernels.gpu import products, warpgroup
from pallas_kernels.gpu.machine import HOPPER

X, W = jnp.ones((8, 16)), jnp.ones((16, 16))


def _flops(function: object, *arguments: jax.Array) -> float:
    return product_flops(jax.make_jaxpr(function)(*arguments))


def test_products_of_one_call() -> None:
    one = 2 * 8 * 16 * 16
    assert _flops(jnp.matmul, X, W) == one
    assert _flops(jax.grad(lambda w: jnp.sum(jnp.matmul(X, w) ** 2)), W) == 2 * one
    assert _flops(lambda x: jnp.sin(x).sum(), X) == 0
    signal, kernel = jnp.ones((2, 3, 10)), jnp.ones((5, 3, 4))
    assert _flops(lambda x, w: jax.lax.conv(x, w, (1,), "VALID"), signal, kernel) == 2 * (2 * 5 * 7) * (3 * 4)
    groups, sizes = jnp.ones((4, 16, 16)), jnp.array([1, 0, 5, 2])
    assert _flops(jax.lax.ragged_dot, X, groups, sizes) == one
    both = jax.grad(lambda x, w: jnp.sum(jax.lax.ragged_dot(x, w, sizes) ** 2), argnums=(0, 1))
    assert _flops(both, X, groups) == 3 * one


def test_loops_checkpoints_and_branches_count_as_often_as_they_run() -> None:
    one = 2 * 8 * 16 * 16

    def loop(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, _: (jnp.sin(x @ w), None), x, None, length=5)[0]

    assert _flops(loop, X, W) == 5 * one
    assert _flops(jax.grad(lambda x: loop(x, W).sum()), X) == 10 * one
    again = jax.checkpoint(lambda x: jnp.sin(jnp.sin(x @ W) @ W))
    assert _flops(jax.grad(lambda x: again(x).sum()), X) == 6 * one
    assert _flops(lambda x: jax.lax.cond(x[0, 0] > 0, lambda x: x @ W, lambda x: x, x), X) == one


def test_kernels_count_once_a_grid_step_and_devices_once_each() -> None:
    def body(x: jax.Array, w: jax.Array, out: jax.Array) -> None:
        out[...] = jax.lax.fori_loop(0, 4, lambda _, x: x @ w[...], x[...])

    whole, weights = (pl.BlockSpec(shape, lambda i: (0, 0)) for shape in ((8, 16), (16, 16)))
    shape = jax.ShapeDtypeStruct((8, 16), jnp.float32)
    call = pl.pallas_call(body, shape, grid=(3,), in_specs=[whole, weights], out_specs=whole, name="powers")
    assert _flops(call, X, W) == 3 * 4 * 2 * 8 * 16 * 16
    calls = kernel_calls(jax.make_jaxpr(jax.jit(lambda x: call(call(x, W), W)))(X))
    assert [(found.name, found.steps, found.results) for found in calls] == 2 * [("powers", 3, ((8, 16),))]
    mesh = make_mesh(MeshConfig())
    cut = jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"))
    assert _flops(cut, X, W) == 2 * 8 * 16 * 16


def test_kernels_for_gpus_count_what_their_tiles_multiply_once_a_program() -> None:
    def powers(x: jax.Array) -> jax.Array:
        def body(x: Any, out: Any, scratch: Any) -> None:
            tiles, ready = scratch
            warpgroup.load(ready, (x, tiles))
            warpgroup.loaded(ready)
            ((total,), _) = products.products_over(
                4, lambda n, last: ([[(tiles.at[n], tiles.at[0])]], last), 0, (64, 64)
            )
            tiles[0] = (total + products.product((tiles.at[1], tiles.at[2]))).astype(jnp.bfloat16)
            warpgroup.store((tiles.at[0], out))

        scratch = (warpgroup.shared(4, 64, 64), plgpu.Barrier())
        return warpgroup.kernel(
            HOPPER, body, x, jax.ShapeDtypeStruct((64, 64), jnp.bfloat16), scratch, {"one": 3}, "powers"
        )

    jaxpr = jax.make_jaxpr(powers)(jnp.ones((4, 64, 64), jnp.bfloat16))
    assert product_flops(jaxpr) == 3 * (4 + 1) * 2 * 64**3
    (call,) = kernel_calls(jaxpr)
    assert (call.name, call.steps, call.threads, call.bytes) == ("powers", 3, 128, 5 * 64 * 64 * 2)
    assert call.loops == (64**3, (Loop(4, 64**3, ()),))


def test_a_collective_that_is_started_names_its_operands_too() -> None:
    """So XLA writes it for GPUs."""
    result = "((f32[8,5]{1,0}, f32[8]{0}), f32[2,5]{1,0}, f32[2]{0})"
    groups = "replica_groups=[2,4]<=[8], to_apply=%add"
    hlo = f"""HloModule step, num_partitions=8
ENTRY %main (a: f32[8,5], b: f32[8]) -> f32[2,5] {{
  %start = {result} reduce-scatter-start(%a, %b), channel_id=1, {groups}
}}
"""
    assert collective_bytes(hlo) == {"reduce-scatter": 3 / 4 * (8 * 5 + 8) * 4}


@pytest.mark.parametrize("length", [1, 6])
@pytest.mark.parametrize(
    ("kind", "share", "function", "out"),
    [
        ("all-reduce", 2 * 3 / 4, lambda x: jax.lax.psum(x, "fsdp"), P("tensor")),
        ("all-gather", 3 / 4 * 4, lambda x: jax.lax.all_gather(x, "fsdp"), P(None, "tensor")),
        ("reduce-scatter", 3 / 4, lambda x: jax.lax.psum_scatter(x, "fsdp"), P(("tensor", "fsdp"))),
        ("all-to-all", 3 / 4, lambda x: jax.lax.all_to_all(x, "fsdp", 0, 0), P(("tensor", "fsdp"))),
        (
            "collective-permute",
            1,
            lambda x: jax.lax.ppermute(x, "fsdp", [(0, 1), (1, 2), (2, 3), (3, 0)]),
            P(("tensor", "fsdp")),
        ),
    ],
)
def test_every_collective(kind: str, share: float, function: object, out: P, length: int) -> None:
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))

    def repeated(x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda _, x: (None, function(x)), None, x)[1]

    cut = jax.shard_map(
        repeated, mesh=mesh, in_specs=P(None, ("tensor", "fsdp")), out_specs=P(None, *out), check_vma=False
    )
    compiled = jax.jit(cut).lower(jax.ShapeDtypeStruct((length, 32, 5), jnp.float32)).compile()
    assert collective_bytes(compiled.as_text()) == pytest.approx({kind: length * share * 4 * 5 * 4})


# What the TPU compiler writes: one all-gather in pieces, over the steps of a loop inside, and an all-reduce cut at once.
TPU_PROGRAM = """HloModule jit_step, is_scheduled=true, num_partitions=8

%piece (p: bf16[2,16]) -> bf16[8,16] {
  ROOT %all-gather.1 = bf16[8,16]{1,0:T(8,128)(2,1)S(1)} all-gather(%p), channel_id=7, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}
}

%all-reduce-scatter.3 (p: f32[8,16]) -> f32[2,16] {
  %all-reduce.5 = f32[8,16]{1,0:T(8,128)} all-reduce(%p), channel_id=9, replica_groups=mesh['a'=4,'b'=2] {'a'}, to_apply=%add
  ROOT %s = f32[2,16]{1,0} dynamic-slice(%all-reduce.5, %z, %z), dynamic_slice_sizes={2,16}
}

%inner_body (t: (s32[], bf16[2,16])) -> (s32[], bf16[2,16]) {
  %fusion.1 = bf16[8,16]{1,0} fusion(%x), kind=kCustom, calls=%piece
}

%inner_condition (t: (s32[], bf16[2,16])) -> pred[] {
  %bound = s32[]{:T(128)} constant(16)
  ROOT %lt = pred[]{:T(512)} compare(%i, %bound), direction=LT
}

%body (t: (s32[], bf16[2,16])) -> (s32[], bf16[2,16]) {
  %fusion.2 = bf16[8,16]{1,0} fusion(%x), kind=kCustom, calls=%piece_2
  %while.1 = (s32[], bf16[2,16]) while(%t), condition=%inner_condition, body=%inner_body
  %fusion.3 = f32[2,16]{1,0} fusion(%y), kind=kCustom, calls=%all-reduce-scatter.3
}

%piece_2 (p: bf16[2,16]) -> bf16[8,16] {
  ROOT %all-gather.2 = bf16[8,16]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=7, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}
}

%condition (t: (s32[], bf16[2,16])) -> pred[] {
  %bound.2 = s32[]{:T(128)} constant(24)
  ROOT %lt.2 = pred[]{:T(512)} compare(%i, %bound.2), direction=LT
}

ENTRY %main.1 (a: bf16[2,16]) -> f32[] {
  %while.2 = (s32[], bf16[2,16]) while(%t), condition=%condition, body=%body
  %all-to-all.1 = bf16[2,16]{1,0} all-to-all(%a), channel_id=12, replica_groups=mesh['a'=4,'b'=2] {'a':(2)2}, dimensions={0}
  ROOT %all-reduce.6 = f32[] all-reduce(%l), channel_id=11, replica_groups={}, to_apply=%add
}
"""  # noqa: E501


def test_the_forms_of_the_tpu_compiler() -> None:
    assert collective_bytes(TPU_PROGRAM) == pytest.approx({
        "all-gather": 24 * 3 / 4 * 8 * 16 * 2,
        "reduce-scatter": 24 * 3 / 4 * 8 * 16 * 4,
        "all-reduce": 2 * 7 / 8 * 4,
        "all-to-all": 1 / 2 * 2 * 16 * 2,
    })  # fmt: skip
