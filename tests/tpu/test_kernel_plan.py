"""How calls are cut into grid steps; nothing is compiled."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.inputs import Inputs
from pallas_kernels.tpu import op
from pallas_kernels.tpu.backward import backward_bytes
from pallas_kernels.tpu.forward import ahead_specs, ahead_start, forward_bytes
from pallas_kernels.tpu.plan import FEW_TILES, MAX_GROUP
from pallas_kernels.tpu.products import TILE

MIB = 2**20
LARGE, SMALL = 120 * MIB, 60 * MIB  # what kernels may use of v5e and v6e, and of TPU7x


def _arrays(heads: int, key: int, value: int, gate: Literal["head", "channel"] = "head", *, time: int = 4096) -> Inputs:
    def shape(*last: int, dtype: Any = jnp.bfloat16) -> Any:
        return jax.ShapeDtypeStruct((1, time, heads, *last), dtype)

    g = shape(*(key,) * (gate == "channel"), dtype=jnp.float32)
    return Inputs(shape(key), shape(key), shape(value), shape(dtype=jnp.float32), g, None)


@pytest.mark.parametrize(
    ("memory", "arrays", "heads", "group"),
    [
        (SMALL, _arrays(32, 128, 128, "channel"), 8, 4),
        (SMALL, _arrays(6, 256, 512), 6, 2),  # heads before tiles
        (LARGE, _arrays(6, 256, 512), 6, 4),
        (LARGE, _arrays(9, 192, 384), 9, 4),
        (LARGE, _arrays(10, 192, 384), 10, 4),  # 5 heads of 192 are no whole registers
        (LARGE, _arrays(10, 128, 128), 5, 4),
        (LARGE, _arrays(11, 128, 128), 11, 4),
        (LARGE, _arrays(13, 128, 128), 13, 4),
        (LARGE, _arrays(22, 128, 128), 11, 4),
        (LARGE, _arrays(17, 128, 128), 1, 4),
        (LARGE, _arrays(32, 128, 128, time=5 * TILE), 8, 3),
    ],
)
def test_steps_of_the_most_heads_and_then_tiles(
    memory: int, arrays: Inputs, heads: int, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(op, "vmem_bytes", lambda: memory)
    for needs in (forward_bytes, backward_bytes):
        plan = op.plan_of(arrays, 1.0, True, needs)
        assert (plan.heads, plan.group) == (heads, group)
        assert needs(plan) <= memory


def test_padding_to_whole_steps_changes_no_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    for memory in range(8, 60, 4):
        monkeypatch.setattr(op, "vmem_bytes", lambda memory=memory: memory * MIB)
        for tiles in range(1, 4 * MAX_GROUP):
            group = op.plan_of(_arrays(6, 256, 512, time=tiles * TILE), 1.0, True, backward_bytes).group
            steps = -(-tiles // group)
            plan = op.plan_of(_arrays(6, 256, 512, time=steps * group * TILE), 1.0, True, forward_bytes)
            assert (plan.group, plan.groups) == (group, steps)


def test_blocks_hold_the_tile_that_is_prepared_ahead() -> None:
    for tiles in range(1, 4 * MAX_GROUP):
        for erases in (False, True):
            plan = op.plan_of(_arrays(6, 256, 512, time=tiles * TILE), 1.0, erases, forward_bytes)
            assert plan.ahead == (erases and plan.tiles >= FEW_TILES)
            (_, block, _) = ahead_specs(plan).q.block_shape
            for step in range(plan.groups):
                first = int(ahead_start(plan, jnp.int32(step)))
                reached = min((step + 1) * plan.group + plan.ahead, plan.tiles)
                assert 0 <= first <= step * plan.group
                assert reached <= first + block.block_size // TILE <= plan.tiles
