"""The decode loop as the compiler of TPUs leaves it: every state is read and written where it lies."""

import math
import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from delta_jax import delta_product
from delta_jax.inference.generate import _decode
from delta_jax.inference.sampling import Sampling
from delta_jax.layers.projection import project
from delta_jax.models import LanguageModel, MixerSpec, ModelConfig
from delta_jax.ops.prologue import step_by_kernel

BATCH, LAYERS, VOCAB = 8, 40, 16  # states of 160 MiB: fewer would be moved to vector memory as a whole
MIXERS = {
    "gated_delta_net": {"num_heads": 8, "head_dim": 128},
    "delta_product": {"num_heads": 8, "head_dim": 128, "num_householder": 2},
}


@pytest.mark.parametrize("mixer", MIXERS)
def test_no_state_is_copied(compile_for: Any, mixer: str) -> None:
    """Neither that of a layer nor those of all, and those of the next token take the place of the last one's."""
    pattern = (MixerSpec(mixer=mixer, options=tuple(MIXERS[mixer].items())),)
    dtypes = {"dtype": "bfloat16", "param_dtype": "bfloat16"}
    config = ModelConfig(
        vocab_size=VOCAB, hidden_size=256, num_layers=LAYERS, pattern=pattern, intermediate_size=0, **dtypes
    )
    model = nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))
    cache = jax.eval_shape(lambda: model.init_cache(BATCH))
    state = math.prod(cache[0].state.shape) // LAYERS

    def shape(*axes: int, dtype: Any = jnp.bool_) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(axes, dtype)

    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), BATCH))
    numbers = jax.eval_shape(Sampling().numbers)
    logits, seen = shape(BATCH, VOCAB, dtype=jnp.float32), shape(BATCH, VOCAB)
    rest = shape(BATCH), keys, numbers, shape(VOCAB), shape(2, dtype=jnp.int32)
    compiled = compile_for("v6e", _decode, model, logits, cache, seen, *rest)

    text = compiled.as_text()
    assert re.search(r"delta_rule_step\S* = .* custom-call\(", text)
    moves = re.findall(r"= (.*?) ((?:copy|dynamic-slice|dynamic-update-slice|fusion)(?:-start)?)\(", text)
    sizes = [
        (math.prod(map(int, axes.split(","))), move)
        for kind, move in moves
        for axes in re.findall(r"f32\[([\d,]+)", kind)
    ]
    assert not [(size, move) for size, move in sizes if size >= state]
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= 4 * state * LAYERS
    assert memory.temp_size_in_bytes < 4 * state


@pytest.mark.parametrize("rows", [1, 3])
def test_few_rows_take_a_product_with_the_weights(compile_for: Any, rows: int) -> None:
    """Of a single row the compiler would make a loop over the weights, which the units of products have no part in."""
    x, kernel = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((rows, 1, 512), (512, 1024)))
    compiled = compile_for("v6e", lambda x, kernel: project(x, kernel, (((2,), (0,)), ((), ()))), x, kernel)
    assert " convolution(" in compiled.as_text()
    assert compiled.out_info.shape == (rows, 1, 1024)


def test_a_few_tokens_of_sizes_that_fill_no_registers(compile_for: Any) -> None:
    """Three tokens of two writes with heads of 64 channels, of which one is half a register, and their convolutions."""

    def shape(*axes: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(axes, jnp.bfloat16)

    def float32(*axes: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(axes, jnp.float32)

    layer, written = jax.ShapeDtypeStruct((), jnp.int32), shape(3, 3, 2, 1, 64)
    op = partial(delta_product, scale=1.0, implementation="mosaic_tpu")
    step = compile_for(
        "v6e",
        lambda q, k, v, beta, g, states, layer: op(q, k, v, beta, g, initial_state=states, layer=layer),
        *(shape(3, 3, 1, 64), written, written, float32(3, 3, 2, 1), float32(3, 3, 1), float32(2, 3, 1, 64, 64), layer),
    )
    assert "delta_rule_step" in step.as_text()
    streams, kernels, tails = ([shape(*axes, n) for n in (64, 192)] for axes in ((3, 3), (4,), (2, 3, 3)))
    around = partial(step_by_kernel, activations=["silu"] * 2, sizes=[64, 64])
    convolution = compile_for("v6e", around, streams, kernels, [shape(64), None], tails, layer)
    assert "short_convolution_step" in convolution.as_text()
