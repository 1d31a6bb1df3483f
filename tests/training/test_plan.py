"""Plans for TPUs that are not here, with the real compiler."""

import functools

import jax
import pytest

from delta_jax.config import load_config
from delta_jax.parallel import links_of, tpu_topology
from delta_jax.training import TrainConfig
from delta_jax.training.plan import Plan, plan

pytest.importorskip("libtpu", reason="libtpu, which compiles for TPUs that are not here, is not installed")

MODEL = {"vocab_size": 512, "hidden_size": 256, "num_layers": 2, "intermediate_size": 256, "remat": "block"}


@functools.cache
def _plan(topology: str, *overrides: str) -> Plan:
    pattern = [{"mixer": "delta_net", "num_heads": 2, "head_dim": 128}]
    table = {"steps": 10, "batch_size": 8, "sequence_length": 128, "model": {**MODEL, "pattern": pattern}}
    return plan(load_config(TrainConfig, table, overrides), topology)


def test_one_chip() -> None:
    one = _plan("v5e:1x1")
    assert (one.chips, one.devices, one.device_kind, one.hbm) == (1, 1, "TPU v5 lite", 16 * 2**30)
    assert one.mesh == {"data": 1, "fsdp": 1, "sequence": 1, "tensor": 1}
    named = [
        f"{what}_{way}" for what in ("short_convolution", "delta_rule", "gated_norm") for way in ("forward", "backward")
    ]
    assert sorted(one.kernels) == sorted(named)
    assert one.exchanges == ()
    assert one.fits and one.refusal is None and one.memory is not None
    # Parameters and both moments of AdamW in float32, besides the batch; all of it is donated, all but the metrics.
    assert 12 * one.parameters < one.memory.arguments < 12 * one.parameters + 200_000
    assert one.memory.outputs < 10_000
    # Six operations a parameter and token, two more for what is computed again, and the kernels, whose share is large here.
    tokens, matrices = 8 * 128, one.parameters - 512 * 256
    assert 6 * matrices * tokens < one.flops < 20 * matrices * tokens
    # At least the state is read and written; at most a few hundred numbers a token and layer of the width besides.
    assert 24 * one.parameters < one.traffic < 24 * one.parameters + 2 * tokens * 256 * 4 * 300
    estimate = one.estimate
    assert estimate is not None and estimate.tokens == tokens and estimate.collectives == 0
    # All products at the peak of the chip are the least they can take; elementwise work is about half of so small a step.
    assert one.flops / 197e12 < estimate.products + estimate.kernels
    assert not estimate.calibrated
    whole = estimate.products + estimate.kernels + estimate.others
    assert 0.3 * whole < estimate.others < 0.7 * whole
    assert (estimate.least, estimate.most) == pytest.approx((whole * 0.9 / 1.05, whole * 1.2 / 1.05))
    # Bundles are written where libtpu was told so when it was loaded; another test may have loaded it.
    unread = {name.partition(".")[0] for name in estimate.unread}
    assert (estimate.kernels > 0) if not unread else unread == set(one.kernels)
    # Three times the forward pass: the step without the second forward of rematerialisation.
    assert 0.6 < estimate.useful / (one.flops / 197e12) < 0.9


def test_a_sharded_step_runs_kernels_on_every_chip_and_splits_state_and_work() -> None:
    whole = _plan("v5e:1x1")
    cut = _plan("v5e:2x4", "mesh.fsdp=4", "mesh.tensor=2", "mesh.data=1")
    assert (cut.chips, cut.mesh) == (8, {"data": 1, "fsdp": 4, "sequence": 1, "tensor": 2})
    assert cut.kernels == whole.kernels
    assert cut.memory is not None and whole.memory is not None
    assert cut.memory.arguments < whole.memory.arguments / 7
    assert 0.9 < cut.flops * 8 / whole.flops < 1.2
    over = {exchanged.axes: exchanged for exchanged in cut.exchanges}
    assert list(over) == sorted(over, key=lambda axes: -over[axes].seconds)
    # A layer's weights are gathered for the forward and again for the backward, and their gradients are scattered.
    weights = (cut.parameters - 2 * 512 * 256) / 2
    gathered = 3 / 4 * 2 * weights
    fsdp, tensor = over["fsdp",].received, over["tensor",].received
    assert 2 * gathered < fsdp["all-gather"] < 3 * gathered
    assert gathered < fsdp["reduce-scatter"] < 3 * gathered
    # The outputs of a layer's mixer and of its MLP are summed over the chips that hold parts of both.
    assert tensor["all-reduce"] > 2 * 2 * (8 * 128 / 4 * 256 * 2)
    # One axis of the slice has two chips, so three of the four links of a chip lead to another.
    assert cut.links == {"between chips": 150e9}
    for exchanged in cut.exchanges:
        assert exchanged.seconds == pytest.approx(sum(exchanged.received.values()) / 150e9)
    assert cut.estimate is not None
    assert cut.estimate.collectives == pytest.approx(sum(exchanged.seconds for exchanged in cut.exchanges))


@pytest.mark.slow  # compiles for two kinds of chip
def test_two_devices_a_chip() -> None:
    both = _plan("tpu7x:1x1x1")
    assert (both.chips, both.devices, both.mesh["data"], both.hbm) == (1, 2, 2, 192 * 2**30)
    assert both.flops > 0.99 * _plan("v5e:1x1").flops
    # Each device holds the whole state.
    assert both.memory is not None and both.memory.arguments > 24 * both.parameters
    # They sum gradients over no link.
    assert both.exchanges == () and both.estimate is not None and both.estimate.collectives == 0


def test_the_two_cores_of_a_v4_chip_are_one_device() -> None:
    assert [len(tpu_topology(name)) for name in ("v4:2x2x1", "v5p:2x2x1", "tpu7x:2x2x1")] == [4, 4, 8]


def test_the_links_of_a_slice() -> None:
    devices = tpu_topology("v5e:2x4")
    (link,) = links_of("v5e:2x4", devices, devices[::-1])
    assert (link.place, link.bandwidth) == (tuple(range(8)), 200e9 * 3 / 4)
    devices = tpu_topology("tpu7x:2x2x1")
    (link,) = links_of("tpu7x:2x2x1", devices, devices)
    assert (sorted(link.place), link.bandwidth) == ([0, 0, 1, 1, 2, 2, 3, 3], 600e9 * 2 / 6 / 2)
    (link,) = links_of("v5e:1x1", tpu_topology("v5e:1x1"), tpu_topology("v5e:1x1"))
    assert (link.place, link.bandwidth) == ((0,), 0)


def test_what_does_not_fit_is_said() -> None:
    large = _plan("v5e:1x1", "batch_size=16384", "model.remat=none")
    assert not large.fits
    assert large.memory is None and large.estimate is None
    assert large.refusal is not None and "hbm" in large.refusal.lower() and "\n" not in large.refusal


@pytest.mark.parametrize(
    ("topology", "overrides", "message"),
    [
        ("v5e", (), "wanted 2 numbers of chips"),
        ("v9:2x2", (), "topology 'v9:2x2'"),
        ("v5e:3x3", (), "topology 'v5e:3x3'"),
        ("v3:2x2", (), "topology 'v3:2x2'"),
        ("v5e:2x2", ("mesh.data=3",), "data=3, fsdp=1, sequence=1, tensor=1 does not fit the 4 tpu device"),
        ("v5e:4x4", (), "wanted a multiple of the 16 parts"),
        ("v5e:2x4", ("mesh.tensor=4",), "does not divide over the mesh axis tensor of size 4"),
    ],
)
def test_mistakes(topology: str, overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError) as raised:
        _plan(topology, *overrides)
    assert message in str(raised.value)


def test_a_topology_leaves_the_devices_that_are_here_alone() -> None:
    before = jax.devices()
    assert {device.platform for device in tpu_topology("v6e:2x2")} == {"tpu"}
    assert jax.devices() == before and jax.default_backend() == "cpu"


def test_without_libtpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError) as raised:
        tpu_topology("v5e:1x1")
    assert 'pip install "delta_jax[tpu]"' in str(raised.value)
