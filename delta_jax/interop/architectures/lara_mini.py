"""Lara-4-Mini: Gated DeltaNet, attention in windows with rotary embedding and over everything without, and experts.

Names and splits: transformers, `lara_mini`.
"""

from typing import Any

from delta_jax.interop.architectures import qwen3_5, qwen3_next
from delta_jax.interop.architectures.common import (
    Architecture,
    Inexpressible,
    Names,
    OneOf,
    Rows,
    Tensors,
    mixer,
    one,
    options_of,
    parts,
    stack,
)
from delta_jax.interop.keys import Keys, layer_kinds, rope_keys, rope_options
from delta_jax.models import ExpertsConfig, ModelConfig

PERIOD = ("linear_attention", "sliding_attention", "linear_attention", "full_attention", "sliding_attention")


def config(keys: Keys) -> ModelConfig:
    number = keys.layers(34)
    kinds = layer_kinds(keys, number, [PERIOD[index % 5] for index in range(number)], tuple(dict.fromkeys(PERIOD)))
    keys.demand("hidden_act", "silu", default="silu")
    keys.demand("attention_bias", False, default=False)
    options = {
        "num_heads": keys.get(int, "num_attention_heads", default=16),
        "num_kv_heads": keys.get(int, "num_key_value_heads", default=4),
        "head_dim": keys.get(int, "head_dim", default=128),
        "use_qk_norm": True,
    }
    window = keys.get(int, "sliding_window", default=512)
    turned = rope_options(keys, theta=10000.0, kind="sliding_attention")
    specs = {
        "linear_attention": qwen3_next.gated_delta_net(keys, 8, 16),
        "sliding_attention": mixer("attention", **options, window=window, **turned),
        "full_attention": mixer("attention", **options, rope_fraction=0.0),
    }
    experts = ExpertsConfig(
        expert_size=keys.get(int, "moe_intermediate_size", default=512),
        num_experts=keys.get(int, "num_experts", default=128),
        num_experts_per_token=keys.get(int, "num_experts_per_tok", default=4),
        shared_expert_size=keys.get(int, "shared_expert_intermediate_size", default=512),
        router="softmax",
        normalize_weights=keys.get(bool, "norm_topk_prob", default=True),
        balance_rate=0.0,
    )
    found = ModelConfig(
        vocab_size=keys.get(int, "vocab_size", default=151936),
        hidden_size=keys.get(int, "hidden_size", default=1024),
        **stack([specs[kind] for kind in kinds]),
        intermediate_size=0,
        experts=experts,
        tie_embeddings=keys.get(bool, "tie_word_embeddings", default=True),
        norm_eps=keys.get(float, "rms_norm_eps", default=1e-6),
    )
    keys.finish()
    return found


def tensors(config: ModelConfig, keys: Keys, there: Names) -> Tensors:
    def block(index: int) -> tuple[str, Rows]:
        spec = config.layers[index].mixer
        if spec.mixer == "attention":
            rows = qwen3_next.attention_rows(options_of(config, spec))
        else:
            joined = parts("linear_attn.in_proj.weight", *(f"mixer/{name}_proj/kernel" for name in "qkvgba"))
            norms = ("linear_attn.out_norm.weight", "linear_attn.norm.weight")
            rows = [
                OneOf(((joined,), tuple(qwen3_5.projections()))),
                OneOf(tuple((one(name, "mixer/o_norm/scale"),) for name in norms)),
                *qwen3_next.gated_delta_net_rest(norm=None),
            ]
        return f"model.layers.{index}.", [
            *qwen3_next.norms(config),
            *rows,
            *qwen3_next.expert_rows(config, fused=True),
        ]

    return Tensors(qwen3_next.outer(config), block)


def table(config: ModelConfig) -> dict[str, Any]:
    if config.experts is None:
        raise Inexpressible("it has no experts")
    kinds, windows = [], []
    for layer in config.layers:
        options = options_of(config, layer.mixer)
        if layer.mixer.mixer != "attention":
            kinds.append("linear_attention")
        elif options["window"] is None:
            kinds.append("full_attention")
        else:
            kinds.append("sliding_attention")
            windows.append(options)
    found = qwen3_next.decoder_table(config, "lara_mini", "LaraMiniForCausalLM")
    found |= qwen3_next.routed_table(config) | {"layer_types": kinds}
    if windows:
        found |= {"sliding_window": windows[0]["window"], "rope_parameters": rope_keys(windows[0])}
    return found | {"norm_topk_prob": config.experts.normalize_weights}


ARCHITECTURE = Architecture("transformers", config, tensors, table)
