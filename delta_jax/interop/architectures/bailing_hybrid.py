"""Ling-3.0: Kimi Delta Attention with full-rank bounded gates, latent attention with positions and a gate a head, experts.

Names: inclusionAI, Ling-3.0; transformers, `bailing_hybrid`.
"""

from typing import Any

from delta_jax.interop.architectures import kimi_linear, qwen3_next
from delta_jax.interop.architectures.common import (
    Architecture,
    Inexpressible,
    Names,
    Rows,
    Tensors,
    convolutions,
    first,
    kinds_of,
    mixer,
    mlp,
    one,
    options_of,
    stack,
)
from delta_jax.interop.keys import Keys, layer_kinds, rope_keys, rope_options
from delta_jax.models import ModelConfig

IDLE = (
    "use_grouped_topk",
    "num_nextn_predict_layers",
    "num_mtp_layers",
    "mtp_loss_scaling_factor",
    "qk_head_dim",
    "router_dtype",
)


def config(keys: Keys) -> ModelConfig:
    number = keys.layers(42)
    group = keys.get(int, "layer_group_size", default=6)
    if group < 1:
        raise keys.refuse("layer_group_size", "wanted a positive integer")
    default = ["full_attention" if (index + 1) % group == 0 else "linear_attention" for index in range(number)]
    kinds = layer_kinds(keys, number, default, ("linear_attention", "full_attention"))
    keys.demand("hidden_act", "silu", default="silu")
    keys.demand("attention_bias", False, default=False)
    keys.demand("tie_word_embeddings", False, default=False)  # transformers has a head of its own, whatever it says
    keys.demand("use_qkv_bias", False, default=False)
    heads = keys.get(int, "num_attention_heads", default=32)
    if keys.get(int, "num_key_value_heads", default=heads) != heads:
        raise keys.refuse("num_key_value_heads", f"but num_attention_heads is {heads}")
    bound = keys.get(float, "kda_lower_bound", default=-5.0)
    specs = {
        "linear_attention": mixer(
            "kimi_delta_attention",
            num_heads=keys.get(int, "linear_num_heads", default=heads),
            # transformers writes the rotated channels of latent attention as head_dim, and this beside it.
            head_dim=keys.get(int, "linear_head_dim", "head_dim", default=128),
            conv_size=keys.get(int, "linear_conv_kernel_dim", "short_conv_kernel_size", default=4),
            use_low_rank_gates=False,
            use_output_gate_bias=False,
            gate_lower_bound=bound if keys.get(bool, "kda_safe_gate", default=True) else None,
        ),
        "full_attention": kimi_linear.latent_attention(
            keys,
            heads,
            kimi_linear.LATENT_NORM_EPS,
            **rope_options(keys, theta=6e6),
            rope_interleaved=True,
            use_head_gate=True,
        ),
    }
    found = ModelConfig(
        vocab_size=keys.get(int, "vocab_size", default=157184),
        hidden_size=keys.get(int, "hidden_size", default=2560),
        **stack([specs[kind] for kind in kinds]),
        intermediate_size=keys.get(int, "intermediate_size", default=6144),
        **kimi_linear.routed(
            keys, number, dense=2, experts=512, per_token=8, scale=2.5, expert_size=768, groups=(8, 4)
        ),
        norm_eps=keys.get(float, "rms_norm_eps", default=1e-6),
    )
    keys.finish(IDLE)
    return found


def tensors(config: ModelConfig, keys: Keys, there: Names) -> Tensors:
    def block(index: int) -> tuple[str, Rows]:
        layer = config.layers[index]
        options = options_of(config, layer.mixer)
        if layer.mixer.mixer == "latent_attention":
            rows = kimi_linear.latent_rows(options, "attention.", "dense")
        else:
            names = {f"{name}_proj": f"{name}_proj" for name in "qkvfgb"} | {"dense": "o_proj"}
            rows = [
                *(one(f"attention.{name}.weight", f"mixer/{leaf}/kernel") for name, leaf in names.items()),
                *convolutions([f"attention.{name}_conv1d" for name in "qkv"]),
                one("attention.A_log", "mixer/A_log"),
                one("attention.dt_bias", "mixer/dt_bias"),
                one("attention.o_norm.weight", "mixer/o_norm/scale"),
            ]
        if layer.experts:
            rows += kimi_linear.routed_rows(config, "mlp.", "expert_bias")
        else:
            rows += mlp()
        return f"model.layers.{index}.", [*qwen3_next.norms(config), *rows]

    _, *rest = qwen3_next.outer(config)
    return Tensors(
        [one("model.word_embeddings.weight", "embed/embedding"), *rest], block, kimi_linear.later_layers(config, keys)
    )


def table(config: ModelConfig) -> dict[str, Any]:
    delta, latent = first(config, "kimi_delta_attention"), first(config, "latent_attention")
    if config.experts is None:
        raise Inexpressible("it has no experts")
    bound = delta["gate_lower_bound"]
    return {
        "architectures": ["BailingHybridForCausalLM"],
        "model_type": "bailing_hybrid",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.num_layers,
        "layer_types": kinds_of(config, kimi_linear.KINDS),
        "mlp_layer_types": ["sparse" if layer.experts else "dense" for layer in config.layers],
        "num_attention_heads": latent["num_heads"],
        "num_key_value_heads": latent["num_heads"],
        "head_dim": delta["head_dim"],
        "short_conv_kernel_size": delta["conv_size"],
        "kda_safe_gate": bound is not None,
        "kda_lower_bound": -5.0 if bound is None else bound,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.initializer_std,
        "use_cache": True,
        "rope_parameters": rope_keys(latent),
        **kimi_linear.latent_table(latent),
        **kimi_linear.routed_table(config.experts),
        "num_nextn_predict_layers": 0,
    }


ARCHITECTURE = Architecture("transformers", config, tensors, table)
