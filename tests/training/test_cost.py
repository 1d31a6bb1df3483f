"""FLOPs and the time of exchanges, against programs whose figures are known."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import PartitionSpec as P

from delta_jax.compiled.exchanges import Exchange
from delta_jax.compiled.jaxpr import Loop, kernel_calls
from delta_jax.parallel import Link, MeshConfig, links_of, make_mesh
from delta_jax.training.cost import Exchanged, exchange_seconds, exchanged, product_flops
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


def test_exchanges_by_axes_take_as_long_as_the_slower_link() -> None:
    """Two hosts of four GPUs, a mesh of four times two: the first axis crosses hosts, the second does not."""
    links = links_of("h100:4x2", jax.devices(), jax.devices())
    rows, columns = ((0, 1), (2, 3), (4, 5), (6, 7)), ((0, 2, 4, 6), (1, 3, 5, 7))
    gather, swap = (Exchange(kind=kind, groups=columns, size=4000, runs=5) for kind in ("all-gather", "all-to-all"))
    total = Exchange(kind="all-reduce", groups=rows, size=10**6, runs=2)
    assert exchanged([gather, total, swap], links, {"x": 4, "y": 2}) == (
        Exchanged(axes=("y",), received={"all-reduce": 2e6}, seconds=2e6 / 450e9),
        Exchanged(axes=("x",), received={"all-gather": 15e3, "all-to-all": 15e3}, seconds=(5e3 + 10e3) / 50e9),
    )
    assert exchange_seconds([gather, total, swap], links) == (2e6 + 10e3 + 5e3) / 450e9


def test_what_two_devices_of_a_chip_exchange_crosses_no_link() -> None:
    links = (Link("between chips", (0, 0, 1, 1), 50.0),)
    near, far, all_ = (
        Exchange(kind="all-reduce", groups=groups, size=100, runs=1)
        for groups in (((0, 1), (2, 3)), ((0, 2), (1, 3)), ((0, 1, 2, 3),))
    )
    assert exchanged([near, far, all_], links, {"x": 2, "y": 2}, cores=2) == (
        Exchanged(axes=("x",), received={"all-reduce": 200.0}, seconds=100 / 50),
        Exchanged(axes=("x", "y"), received={"all-reduce": 100.0}, seconds=50 / 50),
    )
    assert exchange_seconds([near], links) == exchange_seconds([], links) == 0
