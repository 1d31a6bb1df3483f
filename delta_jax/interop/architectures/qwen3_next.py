"""Qwen3-Next: Gated DeltaNet and gated attention, three to one, and experts.

Names and splits: transformers, `qwen3_next`; Qwen Team, "Qwen3-Next", 2025.
"""

from typing import Any

from delta_jax.interop.architectures.common import (
    Architecture,
    Inexpressible,
    Names,
    Rows,
    Tensors,
    experts,
    first,
    kinds_of,
    mixer,
    mlp,
    norm_name,
    one,
    options_of,
    parts,
    stack,
)
from delta_jax.interop.keys import Keys, layer_kinds, rope_keys, rope_options
from delta_jax.models import ExpertsConfig, MixerSpec, ModelConfig

KINDS = {"gated_delta_net": "linear_attention", "attention": "full_attention"}
MTP = r"mtp\..*"
ROUTED = ("moe_intermediate_size", "num_experts_per_tok", "shared_expert_intermediate_size", "norm_topk_prob")


def config(keys: Keys) -> ModelConfig:
    dense = dense_layers(keys)
    layers = keys.layers(48)
    found = decoder(keys, sizes=(151936, 2048, 48), attention=(16, 2), gated=(16, 32))
    found["intermediate_size"] = keys.get(int, "intermediate_size", default=5632)
    if len(dense) < layers:
        found |= {"dense_layers": dense, "experts": routed(keys, experts=512, per_token=10)}
    keys.finish(ROUTED)  # of no layer, if all are dense
    return ModelConfig(**found)


def dense_layers(keys: Keys) -> tuple[int, ...]:
    """The layers whose feed-forward part is no mixture of experts."""
    layers = keys.layers(48)
    step, only = (
        keys.get(int, "decoder_sparse_step", default=1),
        keys.get(tuple[int, ...], "mlp_only_layers", default=()),
    )
    if step < 1:
        raise keys.refuse("decoder_sparse_step", "wanted a positive integer")
    if keys.get(int, "num_experts", default=512) == 0:
        return tuple(range(layers))
    return tuple(index for index in range(layers) if index in only or (index + 1) % step)


def routed(keys: Keys, *, experts: int, per_token: int) -> ExpertsConfig:
    """A softmax router; the files have no bias of it, so training must not move one."""
    return ExpertsConfig(
        expert_size=keys.get(int, "moe_intermediate_size", default=512),
        num_experts=keys.get(int, "num_experts", default=experts),
        num_experts_per_token=keys.get(int, "num_experts_per_tok", default=per_token),
        shared_expert_size=keys.get(int, "shared_expert_intermediate_size", default=512),
        router="softmax",
        use_shared_expert_gate=keys.get(int, "shared_expert_intermediate_size", default=512) > 0,
        normalize_weights=keys.get(bool, "norm_topk_prob", default=True),
        balance_rate=0.0,
    )


def decoder(
    keys: Keys,
    *,
    sizes: tuple[int, int, int],
    attention: tuple[int, int],
    gated: tuple[int, int],
    zero_centered: bool = True,
) -> dict[str, Any]:
    """All but the feed-forward part, from the keys that this family shares and the defaults of the member."""
    vocabulary, width, layers = sizes
    number = keys.layers(layers)
    every = keys.get(int, "full_attention_interval", default=4)
    if every < 1:
        raise keys.refuse("full_attention_interval", "wanted a positive integer")
    default = ["full_attention" if (index + 1) % every == 0 else "linear_attention" for index in range(number)]
    kinds = layer_kinds(keys, number, default, tuple(KINDS.values()))
    keys.demand("hidden_act", "silu", default="silu")
    keys.demand("attn_output_gate", True, default=True)
    keys.demand("attention_bias", False, default=False)
    heads, kv_heads = attention
    specs = {
        "linear_attention": gated_delta_net(keys, *gated),
        "full_attention": mixer(
            "attention",
            num_heads=keys.get(int, "num_attention_heads", default=heads),
            num_kv_heads=keys.get(int, "num_key_value_heads", default=kv_heads),
            head_dim=keys.get(int, "head_dim", default=256),
            **rope_options(keys, theta=10000.0, fraction=0.25),
            use_qk_norm=True,
            zero_centered_norms=zero_centered,
            use_output_gate=True,
        ),
    }
    return {
        "vocab_size": keys.get(int, "vocab_size", default=vocabulary),
        "hidden_size": keys.get(int, "hidden_size", default=width),
        **stack([specs[kind] for kind in kinds]),
        "tie_embeddings": keys.get(bool, "tie_word_embeddings", default=False),
        "norm_eps": keys.get(float, "rms_norm_eps", default=1e-6),
        "zero_centered_norms": zero_centered,
    }


def gated_delta_net(keys: Keys, key_heads: int, value_heads: int, **more: Any) -> MixerSpec:
    """The linear layers, from the keys that start with linear_."""
    key = keys.get(int, "linear_key_head_dim", default=128)
    if key < 1:
        raise keys.refuse("linear_key_head_dim", "wanted a positive integer")
    return mixer(
        "gated_delta_net",
        num_heads=keys.get(int, "linear_num_key_heads", default=key_heads),
        num_v_heads=keys.get(int, "linear_num_value_heads", default=value_heads),
        head_dim=key,
        expand_v=keys.get(int, "linear_value_head_dim", default=128) / key,
        conv_size=keys.get(int, "linear_conv_kernel_dim", default=4),
        **more,
    )


def outer(config: ModelConfig, prefix: str = "model.", head: str = "lm_head.weight") -> Rows:
    """Embedding, last norm and head."""
    norm = norm_name(config.zero_centered_norms)
    rows: Rows = [
        one(f"{prefix}embed_tokens.weight", "embed/embedding"),
        one(f"{prefix}norm.weight", f"final_norm/{norm}"),
    ]
    return rows if config.tie_embeddings else [*rows, one(head, "lm_head/kernel")]


def norms(config: ModelConfig) -> Rows:
    norm = norm_name(config.zero_centered_norms)
    return [
        one("input_layernorm.weight", f"mixer_norm/{norm}"),
        one("post_attention_layernorm.weight", f"mlp_norm/{norm}"),
    ]


def attention_rows(options: dict[str, Any], prefix: str = "self_attn.") -> Rows:
    """Attention; a gate lies in the queries, head by head."""
    gate = options["use_output_gate"]
    queries = ["mixer/q_proj/kernel", "mixer/g_proj/kernel"] if gate else ["mixer/q_proj/kernel"]
    rows: Rows = [parts(f"{prefix}q_proj.weight", *queries, groups=options["num_heads"] if gate else 1)]
    rows += [one(f"{prefix}{name}_proj.weight", f"mixer/{name}_proj/kernel") for name in "kvo"]
    if options["use_qkv_bias"]:
        rows += [one(f"{prefix}{name}_proj.bias", f"mixer/{name}_proj/bias") for name in "qkv"]
    if options["use_output_bias"]:
        rows.append(one(f"{prefix}o_proj.bias", "mixer/o_proj/bias"))
    if options["use_qk_norm"]:
        norm = norm_name(options["zero_centered_norms"])
        rows += [one(f"{prefix}{name}_norm.weight", f"mixer/{name}_norm/{norm}") for name in "qk"]
    return rows


def gated_delta_net_rest(norm: str | None = "linear_attn.norm.weight") -> Rows:
    """Of a linear layer all but the projections of its input; a norm of None is left to the caller."""
    return [
        parts("linear_attn.conv1d.weight", "mixer/q_conv/kernel", "mixer/k_conv/kernel", "mixer/v_conv/kernel"),
        one("linear_attn.A_log", "mixer/A_log"),
        one("linear_attn.dt_bias", "mixer/dt_bias"),
        *([] if norm is None else [one(norm, "mixer/o_norm/scale")]),
        one("linear_attn.out_proj.weight", "mixer/o_proj/kernel"),
    ]


def expert_rows(config: ModelConfig, *, fused: bool) -> Rows:
    """A router, its experts and the shared one."""
    assert config.experts is not None
    rows = [one("mlp.gate.weight", "mlp/router/kernel"), *experts(fused=fused)]
    if config.experts.shared_expert_size:
        rows += mlp("mlp.shared_expert.", "mlp/shared/")
    if config.experts.use_shared_expert_gate:
        rows.append(one("mlp.shared_expert_gate.weight", "mlp/shared_gate/kernel"))
    return rows


def tensors(config: ModelConfig, keys: Keys, there: Names) -> Tensors:
    def block(index: int) -> tuple[str, Rows]:
        layer = config.layers[index]
        options = options_of(config, layer.mixer)
        if layer.mixer.mixer == "attention":
            rows = attention_rows(options)
        else:
            heads = options["num_heads"]
            rows = [
                parts("linear_attn.in_proj_qkvz.weight", *(f"mixer/{n}_proj/kernel" for n in "qkvg"), groups=heads),
                parts("linear_attn.in_proj_ba.weight", *(f"mixer/{n}_proj/kernel" for n in "ba"), groups=heads),
                *gated_delta_net_rest(),
            ]
        rows += expert_rows(config, fused=False) if layer.experts else mlp()
        return f"model.layers.{index}.", [*norms(config), *rows]

    return Tensors(outer(config), block, MTP)


def table(config: ModelConfig) -> dict[str, Any]:
    found = decoder_table(config, "qwen3_next", "Qwen3NextForCausalLM")
    found |= {"intermediate_size": config.mlp_width, "decoder_sparse_step": 1}
    found["mlp_only_layers"] = [index for index, layer in enumerate(config.layers) if not layer.experts]
    found |= routed_table(config)
    return found | {"norm_topk_prob": config.experts is not None and config.experts.normalize_weights}


def routed_table(config: ModelConfig) -> dict[str, Any]:
    if config.experts is None:  # dense models are Qwen3.5's
        raise Inexpressible("it has no experts")
    return {
        "moe_intermediate_size": config.experts.expert_size,
        "num_experts": config.experts.num_experts,
        "num_experts_per_tok": config.experts.num_experts_per_token,
        "shared_expert_intermediate_size": config.experts.shared_expert_size,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
    }


def decoder_table(config: ModelConfig, model_type: str, architecture: str) -> dict[str, Any]:
    """What `decoder` reads."""
    attention, gated = first(config, "attention"), first(config, "gated_delta_net")
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "layer_types": kinds_of(config, KINDS),
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.initializer_std,
        "use_cache": True,
        "attention_dropout": 0.0,
        "attention_bias": False,
        "num_attention_heads": attention["num_heads"],
        "num_key_value_heads": attention["num_kv_heads"],
        "head_dim": attention["head_dim"],
        "rope_parameters": rope_keys(attention, fraction=True),
        **linear_table(gated),
    }


def linear_table(gated: dict[str, Any]) -> dict[str, Any]:
    """The keys that start with linear_."""
    return {
        "linear_num_key_heads": gated["num_heads"],
        "linear_num_value_heads": gated["num_v_heads"],
        "linear_key_head_dim": gated["head_dim"],
        "linear_value_head_dim": round(gated["head_dim"] * gated["expand_v"]),
        "linear_conv_kernel_dim": gated["conv_size"],
    }


ARCHITECTURE = Architecture("transformers", config, tensors, table)
