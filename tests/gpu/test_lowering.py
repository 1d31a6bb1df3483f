"""The kernels lower for Hopper GPUs that are not here: layouts and copies are checked, up to what ptxas makes of them."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from delta_jax import delta_rule, delta_rule_step
from pallas_kernels import devices

KERNELS = {
    "forward": ("delta_rule_prepare", "delta_rule_forward"),
    "backward": (
        "delta_rule_prepare",
        "delta_rule_forward",
        "delta_rule_reverse",
        "delta_rule_scores",
        "delta_rule_gradients",
    ),
    "pieces": ("delta_rule_ends", "delta_rule_reverse_ends"),
}


class Shape(NamedTuple):
    key_heads: int
    heads: int
    key: int
    value: int
    gate: Literal["none", "head", "channel"]


SHAPES = {
    "DeltaNet 340M": Shape(8, 8, 128, 128, "none"),
    "DeltaNet 1.3B": Shape(16, 16, 128, 128, "none"),
    "Qwen3-Next": Shape(16, 32, 128, 128, "head"),
    "Kimi Linear": Shape(32, 32, 128, 128, "channel"),
    "Gated DeltaNet 1.3B": Shape(6, 6, 256, 512, "head"),
    "heads of 64": Shape(8, 8, 64, 64, "head"),
}


def _inputs(shape: Shape, *leading: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The arguments of `delta_rule`, or with one leading axis of `delta_rule_step`, without their suffix."""
    keys, values = (*leading, shape.key_heads, shape.key), (*leading, shape.heads, shape.value)
    bf16 = jnp.bfloat16
    inputs = {"q": (keys, bf16), "k": (keys, bf16), "v": (values, bf16), "beta": (values[:-1], jnp.float32)}
    if shape.gate != "none":
        last = (shape.key,) if shape.gate == "channel" else ()
        inputs["g"] = ((*values[:-1], *last), jnp.float32)
    return {name: jax.ShapeDtypeStruct(*argument) for name, argument in inputs.items()}


def _text(function: Callable[..., Any], *arguments: Any, kind: str = "NVIDIA H200") -> str:
    """The program that a GPU would run."""
    device = AbstractDevice(device_kind=kind, num_cores=132, platform="gpu")
    mesh = AbstractMesh((1,), ("x",), (AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


def _lowered(function: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[str, ...]:
    """Its kernels."""
    text = _text(function, *arguments, **options)
    names = dict.fromkeys(name for names in KERNELS.values() for name in names)
    return tuple(name for name in names if name in text)


def _loss(inputs: dict[str, jax.Array]) -> jax.Array:
    o, state = delta_rule(**inputs, implementation="pallas")
    return jnp.sum(o.astype(jnp.float32) ** 2) + jnp.sum(state**2)


@pytest.mark.parametrize(
    ("direction", "model", "time"),
    [
        ("forward", "DeltaNet 340M", 2048),
        ("forward", "Qwen3-Next", 8192),
        ("forward", "Kimi Linear", 1000),
        ("forward", "Gated DeltaNet 1.3B", 2048),
        ("forward", "heads of 64", 1),
        ("backward", "DeltaNet 1.3B", 2048),
        ("backward", "Qwen3-Next", 131072),
        ("backward", "Kimi Linear", 2048),
        ("backward", "Gated DeltaNet 1.3B", 2048),
    ],
)
def test_published_models(direction: str, model: str, time: int) -> None:
    function = (lambda x: delta_rule(**x, implementation="pallas")) if direction == "forward" else jax.grad(_loss)
    assert set(KERNELS[direction]) <= set(_lowered(function, _inputs(SHAPES[model], 1, time)))


def test_a_long_sequence_of_one_head() -> None:
    kernels = _lowered(jax.grad(_loss), _inputs(Shape(1, 1, 128, 128, "channel"), 1, 131072))
    assert set(KERNELS["pieces"]) <= set(kernels)


@pytest.mark.parametrize("model", ["DeltaNet 340M", "Qwen3-Next", "Kimi Linear", "Gated DeltaNet 1.3B"])
def test_the_step(model: str) -> None:
    shape = SHAPES[model]
    state = jax.ShapeDtypeStruct((8, shape.heads, shape.key, shape.value), jnp.float32)

    def step(inputs: dict[str, jax.Array], state: jax.Array) -> Any:
        token = {f"{name}_t": array for name, array in inputs.items()}
        return delta_rule_step(**token, state=state, implementation="pallas")

    text = _text(step, _inputs(shape, 8), state)
    assert "delta_rule_step" in text
    assert "output_operand_alias<output_tuple_indices = [1]" in text  # the state is written in place


def test_every_argument_at_once() -> None:
    """Erase keys of every value head, a state to start from, packed segments; all gradients."""
    inputs = _inputs(Shape(2, 4, 128, 64, "head"), 2, 512)
    inputs["erase"] = jax.ShapeDtypeStruct((2, 512, 4, 128), jnp.bfloat16)
    inputs["initial_state"] = jax.ShapeDtypeStruct((2, 4, 128, 64), jnp.float32)
    segment_ids = jax.ShapeDtypeStruct((2, 512), jnp.int32)

    def loss(inputs: dict[str, jax.Array], segment_ids: jax.Array) -> jax.Array:
        return _loss(inputs | {"segment_ids": segment_ids})

    assert set(KERNELS["backward"]) <= set(_lowered(jax.grad(loss), inputs, segment_ids))


@pytest.mark.parametrize("kind", ["NVIDIA A100-SXM4-80GB", "NVIDIA B200", "NVIDIA GeForce RTX 4090"])
def test_elsewhere_the_automatic_choice_is_another_way(kind: str) -> None:
    assert _lowered(lambda x: delta_rule(**x), _inputs(SHAPES["Qwen3-Next"], 1, 256), kind=kind) == ()


def test_on_hopper_the_automatic_choice_is_the_kernels() -> None:
    inputs = _inputs(SHAPES["Qwen3-Next"], 1, 256)
    assert set(KERNELS["forward"]) <= set(_lowered(lambda x: delta_rule(**x), inputs, kind="NVIDIA H200"))


@pytest.mark.parametrize(
    ("kind", "capability", "found"),
    [
        ("NVIDIA H100 80GB HBM3", None, "sm_90"),
        ("NVIDIA A100-SXM4-80GB", "unknown", "sm_80"),
        ("NVIDIA RTX A6000", None, "sm_86"),
        ("NVIDIA GeForce RTX 4090", None, "sm_89"),
        ("NVIDIA B200", None, "sm_100"),
        ("NVIDIA B300", None, "sm_103"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", None, "sm_120"),
        ("a GPU of another name", "9.0", "sm_90"),
        ("AMD Instinct MI300X", "gfx942:sramecc+:xnack-", "gfx942"),
        ("MI300", None, "gfx942"),
        ("AMD Instinct MI250X", None, "gfx90a"),
        ("AMD Instinct MI355X", None, "gfx950"),
        ("GTX 480", None, None),
    ],
)
def test_the_generation_of_a_device(kind: str, capability: str | None, found: str | None) -> None:
    """By what it says of itself, else by its name."""
    device = SimpleNamespace(platform="gpu", device_kind=kind, compute_capability=capability)
    assert devices.generation_of(device) == found
    assert devices.generation_of(jax.devices("cpu")[0]) is None
