"""The real compiler takes the kernels: every generation, the shapes of published models, from one token to 131,072."""

import functools
import re
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from delta_jax import delta_rule, delta_rule_step
from delta_jax.config import load_config
from delta_jax.layers import GatedDeltaNet
from delta_jax.layers.projection import embedded
from delta_jax.ops.short_convolution import short_convolution
from delta_jax.training import TrainConfig

GENERATIONS = ("v5e", "v5p", "v6e", "tpu7x")
KERNELS = {
    "forward": ("delta_rule_forward",),
    "backward": ("delta_rule_forward", "delta_rule_backward"),
    "step": ("delta_rule_step",),
}


class Shape(NamedTuple):
    key_heads: int
    heads: int
    key: int
    value: int
    gate: Literal["none", "head", "channel"]


def _preset(name: str) -> Shape:
    """The shape of the mixer of a preset."""
    model = load_config(TrainConfig, name).model
    options = dict(model.pattern[0].options)
    heads, key = options["num_heads"], options["head_dim"]
    gate: Literal["none", "head"] = "head" if model.pattern[0].mixer == "gated_delta_net" else "none"
    return Shape(heads, heads, key, round(key * options.get("expand_v", 1.0)), gate)


SHAPES = {
    "DeltaNet 340M": _preset("delta_net_340m"),
    "DeltaNet 1.3B": _preset("delta_net_1.3b"),
    "Gated DeltaNet 1.3B": _preset("gated_delta_net_1.3b"),  # 6 heads of 256 x 512
    "Qwen3-Next": Shape(16, 32, 128, 128, "head"),
    "Kimi Linear": Shape(32, 32, 128, 128, "channel"),
}


def _inputs(shape: Shape, *leading: int, dtype: Any = jnp.bfloat16) -> dict[str, jax.ShapeDtypeStruct]:
    """The arguments of `delta_rule`, or with one leading axis of `delta_rule_step`, without their suffix."""
    keys, values = (*leading, shape.key_heads, shape.key), (*leading, shape.heads, shape.value)
    inputs = {"q": (keys, dtype), "k": (keys, dtype), "v": (values, dtype), "beta": (values[:-1], jnp.float32)}
    if shape.gate != "none":
        last = (shape.key,) if shape.gate == "channel" else ()
        inputs["g"] = ((*values[:-1], *last), jnp.float32)
    return {name: jax.ShapeDtypeStruct(*argument) for name, argument in inputs.items()}


def _function(kernel: str) -> Callable[..., Any]:
    if kernel == "step":

        def step(inputs: dict[str, jax.Array], state: jax.Array) -> Any:
            token = {f"{name}_t": array for name, array in inputs.items()}
            return delta_rule_step(**token, state=state, implementation="pallas")

        return step
    forward = functools.partial(delta_rule, implementation="pallas")
    if kernel == "forward":
        return lambda inputs: forward(**inputs)
    return jax.grad(lambda inputs: jnp.sum(forward(**inputs)[0].astype(jnp.float32) ** 2))


def _check(compile_for: Any, generation: str, kernel: str, *arguments: Any) -> None:
    text = compile_for(generation, _function(kernel), *arguments).as_text()
    names = dict.fromkeys(name for names in KERNELS.values() for name in names)
    assert tuple(name for name in names if name in text) == KERNELS[kernel]


# All backwards where vector memory is smallest, all forwards on the oldest, and the heaviest two in one more place each;
# the lengths below add the other generations. A backward compiles its forward too. The whole product takes four times as
# long and says no more.
MODELS = [
    *[("tpu7x", "backward", model) for model in SHAPES],
    *[("v5e", "forward", model) for model in SHAPES],
    ("v5p", "backward", "Gated DeltaNet 1.3B"),
    ("v6e", "backward", "Kimi Linear"),
]


@pytest.mark.parametrize(("generation", "kernel", "model"), MODELS)
def test_published_models(compile_for: Any, generation: str, kernel: str, model: str) -> None:
    _check(compile_for, generation, kernel, _inputs(SHAPES[model], 1, 2048))


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("model", SHAPES)
def test_the_step(compile_for: Any, generation: str, model: str) -> None:
    shape = SHAPES[model]
    state = jax.ShapeDtypeStruct((8, shape.heads, shape.key, shape.value), jnp.float32)
    _check(compile_for, generation, "step", _inputs(shape, 8), state)


@pytest.mark.parametrize(
    ("generation", "time"),
    [("v5e", 1), ("v6e", 128), ("tpu7x", 1000), ("v5e", 32768), pytest.param("v5p", 131072, marks=pytest.mark.slow)],
)
def test_lengths(compile_for: Any, generation: str, time: int) -> None:
    shape = SHAPES["Qwen3-Next"]
    _check(compile_for, generation, "backward", _inputs(shape, 1, time))


def test_float32(compile_for: Any) -> None:
    shape = SHAPES["DeltaNet 340M"]
    _check(compile_for, "v5e", "backward", _inputs(shape, 2, 512, dtype=jnp.float32))


def test_every_argument_at_once(compile_for: Any) -> None:
    """Erase keys of every value head, a gate per channel, a state to start from, packed segments; all gradients."""
    shape = Shape(16, 32, 128, 128, "channel")
    inputs = _inputs(shape, 2, 512)
    inputs["erase"] = jax.ShapeDtypeStruct((2, 512, 32, 128), jnp.bfloat16)
    inputs["initial_state"] = jax.ShapeDtypeStruct((2, 32, 128, 128), jnp.float32)
    segment_ids = jax.ShapeDtypeStruct((2, 512), jnp.int32)

    def loss(inputs: dict[str, jax.Array], segment_ids: jax.Array) -> jax.Array:
        o, state = delta_rule(**inputs, segment_ids=segment_ids, implementation="pallas")
        return jnp.sum(o.astype(jnp.float32) ** 2) + jnp.sum(state**2)

    text = compile_for("tpu7x", jax.grad(loss), inputs, segment_ids).as_text()
    assert all(name in text for name in KERNELS["backward"])


def test_nothing_is_laid_out_anew_around_a_layer(compile_for: Any) -> None:
    """What is not finite is looked for in every call and mended in none: it costs no copy of an array of tokens."""
    layer = nnx.eval_shape(
        lambda: GatedDeltaNet(
            256, num_heads=2, head_dim=256, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)
        )
    )
    graph, parameters = nnx.split(layer)
    x = jax.ShapeDtypeStruct((2, 2048, 256), jnp.bfloat16)
    forward_and_backward = jax.grad(
        lambda p, x: jnp.sum(nnx.merge(graph, p)(x).astype(jnp.float32) ** 2), argnums=(0, 1)
    )
    text = compile_for("v6e", forward_and_backward, parameters, x).as_text()
    assert all(f"gated_norm_{way}" in text for way in ("forward", "backward"))
    every_call = text[text.index("\nENTRY") :]
    copies = re.findall(r"= \w+\[2,2048,(?:\d+,)?\d{3,}\]\S* copy\(", every_call)
    assert copies == []


# A head of a register, of two, of one and a half; channels that fill no whole number of registers; no norm.
PROLOGUES = [
    ("v5e", 1536, 6, "float32"),
    ("v5p", 1728, 9, "bfloat16"),
    ("v6e", 1024, 8, "bfloat16"),
    ("tpu7x", 3072, None, "bfloat16"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("generation", "channels", "heads", "dtype"), PROLOGUES)
def test_the_prologue(compile_for: Any, generation: str, channels: int, heads: int | None, dtype: str) -> None:
    """Convolution, bias, SiLU and norm of packed rows with padding, of a length that fills no block; all gradients."""
    shapes = {
        "x": jax.ShapeDtypeStruct((2, 1000, channels), dtype),
        "kernel": jax.ShapeDtypeStruct((4, channels), jnp.float32),
        "bias": jax.ShapeDtypeStruct((channels,), jnp.float32),
        "cache": jax.ShapeDtypeStruct((2, 3, channels), dtype),
    }
    ids, lengths = jax.ShapeDtypeStruct((2, 1000), jnp.int32), jax.ShapeDtypeStruct((2,), jnp.int32)

    def loss(arrays: dict[str, jax.Array], segment_ids: jax.Array, lengths: jax.Array) -> jax.Array:
        y, _ = short_convolution(
            **arrays,
            segment_ids=segment_ids,
            lengths=lengths,
            activation="silu",
            heads=heads,
            implementation="pallas",
        )
        return jnp.sum(y.astype(jnp.float32) ** 2)

    text = compile_for(generation, jax.grad(loss), shapes, ids, lengths).as_text()
    assert all(name in text for name in ("short_convolution_forward", "short_convolution_backward"))


def test_the_gradient_of_an_embedding_is_a_product(compile_for: Callable[..., jax.stages.Compiled]) -> None:
    """A scatter would be sorted and unrolled, which takes the compiler longer than the kernels of a layer."""
    embed = nnx.eval_shape(lambda: nnx.Embed(512, 256, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    structure, table = nnx.split(embed)

    def gradient(table: Any, ids: jax.Array, d_y: jax.Array) -> Any:
        return jax.vjp(lambda table: embedded(nnx.merge(structure, table), ids), table)[1](d_y)

    shapes = jax.ShapeDtypeStruct((2, 64), jnp.int32), jax.ShapeDtypeStruct((2, 64, 256), jnp.bfloat16)
    text = compile_for("v6e", gradient, table, *shapes).as_text()
    assert " convolution(" in text and " scatter(" not in text and " sort(" not in text
