"""What devices exchange, against programs whose bytes are counted by hand."""

from collections import defaultdict

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from delta_jax.compiled.exchanges import Exchange, exchanges
from delta_jax.parallel import tpu_topology

AXES = ("data", "sequence", "tensor")


def _mesh(topology: str) -> Mesh:
    """Two devices an axis, in an order of their own."""
    if topology != "cpu":
        pytest.importorskip("libtpu", reason="libtpu, which compiles for TPUs that are not here, is not installed")
    devices = np.array(jax.devices() if topology == "cpu" else tpu_topology(topology))
    return Mesh(devices[[0, 1, 3, 2, 7, 6, 4, 5]].reshape(2, 2, 2), AXES, axis_types=(AxisType.Auto,) * 3)


def _received(function: object, mesh: Mesh, *shapes: jax.ShapeDtypeStruct) -> dict[tuple[str, ...], float]:
    cut = jax.shard_map(function, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)  # type: ignore[type-var]
    everywhere = NamedSharding(mesh, P())
    arguments = [jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=everywhere) for shape in shapes]
    text = jax.jit(cut).lower(*arguments).compile().as_text()
    return _over(exchanges(text), dict(mesh.shape))


def _over(found: list[Exchange], mesh: dict[str, int]) -> dict[tuple[str, ...], float]:
    """(kind, *axes) -> bytes."""
    totals: dict[tuple[str, ...], float] = defaultdict(float)
    for exchange in found:
        totals[exchange.kind, *exchange.axes(mesh)] += exchange.received()
    return dict(totals)


@pytest.mark.parametrize("topology", ["cpu", "v5e:2x4", "tpu7x:2x2x1"])
def test_every_collective_once_and_in_a_loop(topology: str) -> None:
    """All of them have the same channel, and two the same shape and the same name; TPU7x gives some to its SparseCore."""

    def step(x: jax.Array) -> list[jax.Array]:
        return [
            jax.lax.psum(x, "data"),
            jax.lax.psum(jnp.sin(x), "data"),
            jax.lax.psum(x[:8], "data"),
            jax.lax.psum(jnp.cos(x), ("data", "tensor")),
            jax.lax.all_gather(x, "tensor"),
            jax.lax.psum_scatter(x, "sequence", tiled=True),
            jax.lax.all_to_all(x, "tensor", 0, 1, tiled=True),
            jax.lax.ppermute(x, "sequence", [(0, 1), (1, 0)]),
        ]

    def run(x: jax.Array, xs: jax.Array) -> tuple[list[jax.Array], list[jax.Array]]:
        return step(x), jax.lax.scan(lambda _, x: (None, step(x)), None, xs)[1]

    shapes = jax.ShapeDtypeStruct((256, 128), jnp.float32), jax.ShapeDtypeStruct((6, 256, 128), jnp.float32)
    whole = 256 * 128 * 4
    assert _received(run, _mesh(topology), *shapes) == {
        ("all-reduce", "data"): 7 * (whole + whole + whole / 32),
        ("all-reduce", "data", "tensor"): 7 * 2 * 3 / 4 * whole,
        ("all-gather", "tensor"): 7 * whole,
        ("reduce-scatter", "sequence"): 7 * whole / 2,
        ("all-to-all", "tensor"): 7 * whole / 2,
        ("collective-permute", "sequence"): 7 * whole,
    }


@pytest.mark.parametrize("topology", ["v5e:2x4", "tpu7x:2x2x1"])
def test_a_ragged_all_to_all_counts_as_the_room_of_its_result(topology: str) -> None:
    """It does not exist on CPUs."""

    def run(rows: jax.Array, sizes: jax.Array) -> jax.Array:
        room = jnp.zeros((192, 128), rows.dtype)
        return jax.lax.ragged_all_to_all(rows, room, sizes, sizes, sizes, sizes, axis_name="tensor")

    shapes = jax.ShapeDtypeStruct((64, 128), jnp.float32), jax.ShapeDtypeStruct((2,), jnp.int32)
    assert _received(run, _mesh(topology), *shapes) == {("ragged-all-to-all", "tensor"): 192 * 128 * 4}


GROUPS = "replica_groups=[2,4]<=[8]"


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        (f"(f32[8], f32[32]) all-gather-start(%a), {GROUPS}", ("all-gather", 3 / 4 * 32 * 4)),
        (
            f"((f32[8], f32[4]), (f32[32], f32[16]), u32[]) all-gather-start(%a, %b), {GROUPS}",
            ("all-gather", 3 / 4 * 48 * 4),
        ),
        (f"(f32[8], f32[4]) all-reduce-start(%a, %b), {GROUPS}", ("all-reduce", 2 * 3 / 4 * 12 * 4)),
        (f"f32[8] all-reduce-start(%a), {GROUPS}", ("all-reduce", 2 * 3 / 4 * 8 * 4)),
        (
            f"((f32[8,5], f32[8]), f32[2,5], f32[2]) reduce-scatter-start(%a, %b), {GROUPS}",
            ("reduce-scatter", 3 / 4 * (8 * 5 + 8) * 4),
        ),
        (f"((f32[8]), f32[8], u32[], u32[]) all-to-all-start(%a), {GROUPS}", ("all-to-all", 3 / 4 * 8 * 4)),
        (f"(f32[2], f32[2], f32[2], f32[2]) all-to-all(%a, %b, %c, %d), {GROUPS}", ("all-to-all", 3 / 4 * 8 * 4)),
        (
            "(f32[8], f32[8], u32[], u32[]) collective-permute-start(%a), source_target_pairs={{0,0},{1,2},{2,1}}",
            ("collective-permute", 8 * 4),
        ),
        ("f32[8] collective-permute(%a), source_target_pairs={{0,0},{1,1}}", None),
        (f"f32[8] collective-broadcast(%a), {GROUPS}", ("collective-broadcast", 8 * 4)),
        ("f32[8] all-reduce(%a), replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}", None),
        ("f32[8] all-reduce(%a), replica_groups=mesh['a'=4,'b'=2] {}", None),
    ],
)
def test_what_is_started_names_its_operands_and_may_keep_words(
    instruction: str, expected: tuple[str, float] | None
) -> None:
    """So XLA writes it for GPUs and TPUs."""
    hlo = f"""HloModule step, num_partitions=8
ENTRY %main (a: f32[8,5], b: f32[8]) -> f32[2,5] {{
  %start = {instruction}, channel_id=1
}}
"""
    found = [(exchange.kind, exchange.received()) for exchange in exchanges(hlo)]
    assert found == ([] if expected is None else [expected])


@pytest.mark.parametrize(
    ("groups", "first", "axes"),
    [
        ("{}", (0, 1, 2, 3, 4, 5, 6, 7), ("x", "y")),
        ("{{0,1},{2,3},{4,5},{6,7}}", (0, 1), ("y",)),
        ("{{0,2,4,6},{1,3,5,7}}", (0, 2, 4, 6), ("x",)),
        ("[4,2]<=[8]", (0, 1), ("y",)),
        ("[2,4]<=[4,2]T(1,0)", (0, 2, 4, 6), ("x",)),
        ("[2,4]<=[2,2,2]T(0,2,1)", (0, 2, 1, 3), ("x", "y")),
        ("mesh['a'=4,'b'=2] {'b'}", (0, 1), ("y",)),
        ("mesh['a'=4,'b'=2] {'b','a'}", (0, 1, 2, 3, 4, 5, 6, 7), ("x", "y")),
        ("mesh['a'=8] {'a':(4)2}", (0, 1), ("y",)),
        ("mesh['a'=8] {'a':(1)4}", (0, 2, 4, 6), ("x",)),
        ("mesh['a'=8] {'a':(1)2,'a':(4)2}", (0, 1, 4, 5), ("x", "y")),
        ("mesh['a'=4,'b'=2] {'a':(2)2}", (0, 2), ("x",)),
        ("mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", (0, 2, 4, 6), ("x",)),
        ("mesh['a'=4,'b'=2], device_ids=(0,2,4,6,1,3,5,7) {'b'}", (0, 2), ("x",)),
    ],
)
def test_between_whom(groups: str, first: tuple[int, ...], axes: tuple[str, ...]) -> None:
    """On a mesh of four times two devices, whatever the compiler calls its axes."""
    hlo = f"""HloModule step, num_partitions=8
ENTRY %main (a: f32[8]) -> f32[8] {{
  ROOT %sum = f32[8] all-reduce(%a), channel_id=1, replica_groups={groups}, use_global_device_ids=true, to_apply=%add
}}
"""
    (exchange,) = exchanges(hlo)
    assert exchange.groups[0] == first and exchange.axes({"x": 4, "y": 2}) == axes
    assert sorted(device for group in exchange.groups for device in group) == list(range(8))


def test_between_places_what_several_need_comes_once() -> None:
    """Eight devices in two groups on hosts of four, two of each group on a host."""
    groups, hosts = ((0, 1, 4, 5), (2, 3, 6, 7)), (0, 0, 0, 0, 1, 1, 1, 1)
    shares = {
        "all-gather": (3 / 4, 1 / 4),
        "reduce-scatter": (3 / 4, 1 / 4),
        "all-reduce": (3 / 2, 1 / 2),
        "all-to-all": (3 / 4, 1 / 2),
        "ragged-all-to-all": (1, 1),
        "collective-broadcast": (1, 1 / 2),
    }
    for kind, (everywhere, between) in shares.items():
        exchange = Exchange(kind=kind, groups=groups, size=100, runs=3)
        assert (exchange.received(), exchange.received(hosts)) == (300 * everywhere, 300 * between), kind
        assert exchange.received((0,) * 8) == 0
    near, far = (Exchange(kind="collective-permute", groups=pairs, size=8, runs=1) for pairs in (((0, 1),), ((0, 4),)))
    assert (near.received(hosts), far.received(hosts)) == (0, 8)


# What the TPU compiler writes: two all-gathers of one shard_map, each started, carried on by fusions, those of a loop inside
# included, and ended; a third like them that it does not overlap; and an all-reduce cut at once.
TPU_PROGRAM = """HloModule jit_step, is_scheduled=true, num_partitions=8

%start (p: bf16[2,16]) -> (bf16[2,16], bf16[8,16], u32[]) {
  %all-gather.1 = bf16[8,16]{1,0:T(8,128)(2,1)S(1)} all-gather(%p), channel_id=1, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}
  ROOT %started = (bf16[2,16], bf16[8,16], u32[]) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%start.2 (p: bf16[2,16]) -> (bf16[2,16], bf16[8,16], u32[]) {
  %all-gather.4 = bf16[8,16]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=1, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}
  ROOT %started.2 = (bf16[2,16], bf16[8,16], u32[]) custom-call(%all-gather.4), custom_call_target="AsyncCollectiveStart"
}

%all-reduce-scatter.3 (p: f32[8,16]) -> f32[2,16] {
  %all-reduce.5 = f32[8,16]{1,0:T(8,128)} all-reduce(%p), channel_id=1, replica_groups=mesh['a'=4,'b'=2] {'a'}, to_apply=%add
  ROOT %s = f32[2,16]{1,0} dynamic-slice(%all-reduce.5, %z, %z), dynamic_slice_sizes={2,16}
}

%all-reduce-scatter.4 (p: f32[8,16]) -> f32[2,16] {
  %all-reduce.7 = f32[8,16]{1,0:T(8,128)} all-reduce(%p), channel_id=1, replica_groups=mesh['a'=4,'b'=2] {'a'}, to_apply=%add
  ROOT %s = f32[2,16]{1,0} dynamic-slice(%all-reduce.7, %z, %z), dynamic_slice_sizes={2,16}
}

%async_collective_fusion.1 (p: bf16[2,16]) -> (f32[8], bf16[8,16]) {
  %all-gather.2 = bf16[8,16]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=1, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}
  ROOT %both = (f32[8], bf16[8,16]) tuple(%x, %all-gather.2)
}

%end (p: bf16[2,16]) -> bf16[8,16] {
  %all-gather.3 = bf16[8,16]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=1, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}
  ROOT %ended = bf16[8,16] custom-call(%all-gather.3), custom_call_target="AsyncCollectiveDone"
}

%inner_body (t: (s32[], bf16[2,16])) -> (s32[], bf16[2,16]) {
  %fusion.1 = bf16[8,16]{1,0} fusion(%x), kind=kOutput, calls=%async_collective_fusion.1
}

%inner_condition (t: (s32[], bf16[2,16])) -> pred[] {
  %bound = s32[]{:T(128)} constant(16)
  ROOT %lt = pred[]{:T(512)} compare(%i, %bound), direction=LT
}

%body (t: (s32[], bf16[2,16])) -> (s32[], bf16[2,16]) {
  %async-collective-start = (bf16[2,16], bf16[8,16], u32[]) fusion(%x), kind=kCustom, calls=%start
  %async-collective-start.2 = (bf16[2,16], bf16[8,16], u32[]) fusion(%x), kind=kCustom, calls=%start.2
  %while.1 = (s32[], bf16[2,16]) while(%t), condition=%inner_condition, body=%inner_body
  %async-collective-done = bf16[8,16] fusion(%x), kind=kCustom, calls=%end
  %fusion.3 = f32[2,16]{1,0} fusion(%y), kind=kCustom, calls=%all-reduce-scatter.3
  %fusion.4 = f32[2,16]{1,0} fusion(%y), kind=kCustom, calls=%all-reduce-scatter.4
  %all-gather.5 = bf16[8,16]{1,0:T(8,128)(2,1)} all-gather(%x), channel_id=1, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}
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
    assert _over(exchanges(TPU_PROGRAM), {"fsdp": 4, "tensor": 2}) == {
        ("all-gather", "fsdp"): 3 * 24 * 3 / 4 * 8 * 16 * 2,
        ("reduce-scatter", "fsdp"): 2 * 24 * 3 / 4 * 8 * 16 * 4,
        ("all-reduce", "fsdp", "tensor"): 2 * 7 / 8 * 4,
        ("all-to-all", "fsdp"): 1 / 2 * 2 * 16 * 2,
    }
