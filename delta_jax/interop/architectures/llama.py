"""Llama and Qwen3: attention alone, from which delta-rule hybrids are converted.

Names: transformers, `llama` and `qwen3`.
"""

from functools import partial
from typing import Any

from delta_jax.interop.architectures import qwen3_next
from delta_jax.interop.architectures.common import (
    Architecture,
    Inexpressible,
    Names,
    Rows,
    Tensors,
    first,
    mixer,
    mlp,
    options_of,
    stack,
)
from delta_jax.interop.keys import Keys, layer_kinds, rope_keys, rope_options
from delta_jax.models import ModelConfig


def config(keys: Keys, *, qwen: bool) -> ModelConfig:
    number = keys.layers(32)
    width = keys.get(int, "hidden_size", default=4096)
    heads = keys.get(int, "num_attention_heads", default=32)
    keys.demand("hidden_act", "silu", default="silu")
    keys.demand("mlp_bias", False, default=False)
    bias = keys.get(bool, "attention_bias", default=False)
    if heads < 1:
        raise keys.refuse("num_attention_heads", "wanted a positive integer")
    options = {
        "num_heads": heads,
        "num_kv_heads": keys.get(int, "num_key_value_heads", default=32 if qwen else heads),
        "head_dim": keys.get(int, "head_dim", default=128 if qwen else width // heads),
        **rope_options(keys, theta=10000.0),
        **({"use_qk_norm": True} if qwen else {}),
        **({"use_qkv_bias": True, "use_output_bias": True} if bias else {}),
    }
    kinds = ["full_attention"] * number
    if qwen:
        window = keys.get(int, "sliding_window", default=4096)
        first_window = keys.get(int, "max_window_layers", default=28)
        if keys.get(bool, "use_sliding_window", default=False):
            kinds = ["sliding_attention" if index >= first_window else "full_attention" for index in range(number)]
    else:
        window = None
    allowed = ("full_attention", "sliding_attention") if qwen else ("full_attention",)
    kinds = list(layer_kinds(keys, number, kinds, allowed))
    specs = {
        "full_attention": mixer("attention", **options),
        "sliding_attention": mixer("attention", **options, window=window),
    }
    found = ModelConfig(
        vocab_size=keys.get(int, "vocab_size", default=151936 if qwen else 32000),
        hidden_size=width,
        **stack([specs[kind] for kind in kinds]),
        intermediate_size=keys.get(int, "intermediate_size", default=22016 if qwen else 11008),
        tie_embeddings=keys.get(bool, "tie_word_embeddings", default=False),
        norm_eps=keys.get(float, "rms_norm_eps", default=1e-6),
    )
    keys.finish()
    return found


def tensors(config: ModelConfig, keys: Keys, there: Names) -> Tensors:
    def block(index: int) -> tuple[str, Rows]:
        rows = qwen3_next.attention_rows(options_of(config, config.layers[index].mixer))
        return f"model.layers.{index}.", [*qwen3_next.norms(config), *rows, *mlp()]

    return Tensors(qwen3_next.outer(config), block)


def table(config: ModelConfig, *, qwen: bool) -> dict[str, Any]:
    options = first(config, "attention")
    if options["use_qk_norm"] != qwen:
        raise Inexpressible("its queries and keys are " + ("not normalised" if qwen else "normalised"))
    found = {
        "architectures": ["Qwen3ForCausalLM" if qwen else "LlamaForCausalLM"],
        "model_type": "qwen3" if qwen else "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": options["num_heads"],
        "num_key_value_heads": options["num_kv_heads"],
        "head_dim": options["head_dim"],
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": rope_keys(options),
        "attention_bias": options["use_qkv_bias"],
        "attention_dropout": 0.0,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.initializer_std,
        "use_cache": True,
    }
    if not qwen:
        return found | {"mlp_bias": False}
    windows = [options_of(config, layer.mixer)["window"] for layer in config.layers]
    window = next((one for one in windows if one is not None), None)
    kinds = ["full_attention" if one is None else "sliding_attention" for one in windows]
    whole = kinds.index("sliding_attention") if window is not None else config.num_layers
    return found | {
        "layer_types": kinds,
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "max_window_layers": whole,
    }


LLAMA = Architecture("transformers", partial(config, qwen=False), tensors, partial(table, qwen=False))
QWEN3 = Architecture("transformers", partial(config, qwen=True), tensors, partial(table, qwen=True))
