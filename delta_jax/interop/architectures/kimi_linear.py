"""Kimi Linear: Kimi Delta Attention and latent attention without positions, three to one, and experts.

Names: Moonshot AI, Kimi-Linear-48B-A3B; transformers, `kimi_linear`, whose own spellings of keys and of a dense layer's
tensors are read too.
"""

from typing import Any

from delta_jax.interop.architectures import qwen3_next
from delta_jax.interop.architectures.common import (
    Architecture,
    Inexpressible,
    Names,
    OneOf,
    Rows,
    Tensors,
    convolutions,
    experts,
    first,
    kinds_of,
    mixer,
    mlp,
    one,
    options_of,
    stack,
)
from delta_jax.interop.keys import Keys, layer_kinds
from delta_jax.models import ExpertsConfig, MixerSpec, ModelConfig

LATENT_NORM_EPS = 1e-6  # of the module in the model's code, whatever rms_norm_eps is
KINDS = {"kimi_delta_attention": "linear_attention", "latent_attention": "full_attention"}
# Of no layer, or what others follow from.
IDLE = ("head_dim", "num_nextn_predict_layers", "rope_theta", "use_grouped_topk", "qk_head_dim")


def config(keys: Keys) -> ModelConfig:
    number = keys.layers(27)
    linear = keys.inner("linear_attn_config")
    keys.demand("hidden_act", "silu", default="silu")
    keys.demand("attention_bias", False, default=False)
    keys.demand("tie_word_embeddings", False, default=False)  # transformers has a head of its own, whatever it says
    keys.demand("mla_use_nope", True, default=True)
    if keys.plain("rope_scaling") is not None:
        raise keys.refuse("rope_scaling", "but this model has no positions")
    keys.plain("rope_parameters")  # of no layer: there are no positions
    heads = keys.get(int, "num_attention_heads", default=32)
    if (kv_heads := keys.get(int, "num_key_value_heads", default=heads)) != heads:
        raise keys.refuse("num_key_value_heads", f"but num_attention_heads is {heads} (not {kv_heads})")
    specs = {
        "linear_attention": mixer(
            "kimi_delta_attention",
            num_heads=linear.get(int, "num_heads", default=keys.get(int, "linear_num_heads", default=32)),
            head_dim=linear.get(int, "head_dim", default=keys.get(int, "linear_head_dim", default=128)),
            conv_size=linear.get(
                int, "short_conv_kernel_size", default=keys.get(int, "linear_conv_kernel_dim", default=4)
            ),
            use_output_gate_bias=False,
        ),
        "full_attention": latent_attention(keys, heads, LATENT_NORM_EPS),
    }
    kinds = _kinds(keys, linear, number)
    linear.finish()
    found = ModelConfig(
        vocab_size=keys.get(int, "vocab_size", default=163840),
        hidden_size=keys.get(int, "hidden_size", default=2304),
        **stack([specs[kind] for kind in kinds]),
        intermediate_size=keys.get(int, "intermediate_size", default=9216),
        **routed(keys, number, dense=1, experts=256, per_token=8, scale=2.446, expert_size=1024, groups=(1, 1)),
        norm_eps=keys.get(float, "rms_norm_eps", default=1e-5),
    )
    keys.finish(IDLE)
    return found


def latent_attention(keys: Keys, heads: int, norm_eps: float, **more: Any) -> MixerSpec:
    return mixer(
        "latent_attention",
        num_heads=heads,
        kv_lora_rank=keys.get(int, "kv_lora_rank", default=512),
        q_lora_rank=keys.get(int, "q_lora_rank", default=None),
        qk_nope_head_dim=keys.get(int, "qk_nope_head_dim", default=128),
        qk_rope_head_dim=keys.get(int, "qk_rope_head_dim", default=64),
        v_head_dim=keys.get(int, "v_head_dim", default=128),
        kv_norm_eps=norm_eps,
        **more,
    )


def _kinds(keys: Keys, linear: Keys, number: int) -> tuple[str, ...]:
    """The kind of each layer; linear_attn_config counts layers from one."""
    attention = linear.get(tuple[int, ...], "full_attn_layers", default=None)
    delta = linear.get(tuple[int, ...], "kda_layers", default=None)
    if attention is None or delta is None:
        default = ["full_attention" if index and index % 4 == 0 else "linear_attention" for index in range(number)]
        return layer_kinds(keys, number, default, tuple(KINDS.values()))
    keys.plain("layer_types")
    if sorted(attention + delta) != list(range(1, number + 1)):
        raise linear.refuse(
            "kda_layers", f"which with full_attn_layers should name each of the layers 1 to {number} once"
        )
    return tuple("full_attention" if index + 1 in attention else "linear_attention" for index in range(number))


def routed(
    keys: Keys,
    number: int,
    *,
    dense: int,
    experts: int,
    per_token: int,
    scale: float,
    expert_size: int,
    groups: tuple[int, int],
) -> dict[str, Any]:
    """`experts` and `dense_layers`, with a sigmoid router; the numbers are the defaults of the architecture."""
    keys.demand("moe_router_activation_func", "sigmoid", default="sigmoid")
    keys.demand("moe_layer_freq", 1, default=1)
    keys.demand("score_function", "sigmoid", default="sigmoid")
    first_dense = keys.get(int, "first_k_dense_replace", default=dense)
    kinds = ["dense" if index < first_dense else "sparse" for index in range(number)]
    kinds = keys.get(tuple[str, ...], "mlp_layer_types", default=tuple(kinds))
    if len(kinds) != number or not set(kinds) <= {"dense", "sparse"}:
        raise keys.refuse("mlp_layer_types", f"wanted dense or sparse for each of {number} layers")
    count, chosen = groups
    count = keys.get(int, "num_expert_group", "n_group", default=count)
    size = keys.get(int, "moe_intermediate_size", default=expert_size)
    found = ExpertsConfig(
        expert_size=size,
        num_experts=keys.get(int, "num_experts", "num_local_experts", "n_routed_experts", default=experts),
        num_experts_per_token=keys.get(int, "num_experts_per_token", "num_experts_per_tok", default=per_token),
        shared_expert_size=size * keys.get(int, "num_shared_experts", "n_shared_experts", default=1),
        router="sigmoid",
        routed_scaling_factor=keys.get(float, "routed_scaling_factor", default=scale),
        normalize_weights=keys.get(bool, "moe_renormalize", "norm_topk_prob", default=True),
        num_expert_groups=count,
        num_groups_per_token=keys.get(int, "topk_group", default=chosen) if count > 1 else 1,
    )
    keys.plain("topk_group")
    if "sparse" not in kinds:
        return {}
    return {"experts": found, "dense_layers": tuple(index for index, kind in enumerate(kinds) if kind == "dense")}


def tensors(config: ModelConfig, keys: Keys, there: Names) -> Tensors:
    def block(index: int) -> tuple[str, Rows]:
        layer = config.layers[index]
        options = options_of(config, layer.mixer)
        rows = latent_rows(options) if layer.mixer.mixer == "latent_attention" else _delta_rows(options)
        if layer.experts:
            rows += routed_rows(config, "block_sparse_moe.", "e_score_correction_bias", ("w1", "w3", "w2"))
        else:
            rows.append(OneOf((tuple(mlp()), tuple(mlp("block_sparse_moe.")))))
        return f"model.layers.{index}.", [*qwen3_next.norms(config), *rows]

    return Tensors(qwen3_next.outer(config), block, later_layers(config, keys))


def routed_rows(config: ModelConfig, prefix: str, bias: str, *names: tuple[str, str, str]) -> Rows:
    """A router with a bias, its experts, by those names or the usual ones, and the shared one."""
    assert config.experts is not None
    return [
        one(f"{prefix}gate.weight", "mlp/router/kernel"),
        one(f"{prefix}gate.{bias}", "mlp/expert_bias"),
        *experts(f"{prefix}experts.", *names),
        *(mlp(f"{prefix}shared_experts.", "mlp/shared/") if config.experts.shared_expert_size else []),
    ]


def later_layers(config: ModelConfig, keys: Keys) -> str:
    """The names of layers after the last, which predict several tokens at once."""
    count = keys.get(int, "num_nextn_predict_layers", "num_mtp_layers", default=0)
    numbers = "|".join(str(config.num_layers + index) for index in range(min(count, 64)))
    return rf"mtp\..*|model\.layers\.({numbers})\..*" if numbers else r"mtp\..*"


def latent_rows(options: dict[str, Any], prefix: str = "self_attn.", output: str = "o_proj") -> Rows:
    """Latent attention."""
    names = {
        "kv_a_proj_with_mqa": "kv_a_proj/kernel",
        "kv_a_layernorm": "kv_norm/scale",
        "kv_b_proj": "kv_b_proj/kernel",
        output: "o_proj/kernel",
    }
    if options["q_lora_rank"] is None:
        names["q_proj"] = "q_proj/kernel"
    else:
        names |= {"q_a_proj": "q_a_proj/kernel", "q_a_layernorm": "q_norm/scale", "q_b_proj": "q_b_proj/kernel"}
    if options["use_head_gate"]:
        names["g_proj"] = "g_proj/kernel"
    return [one(f"{prefix}{name}.weight", f"mixer/{leaf}") for name, leaf in names.items()]


def _delta_rows(options: dict[str, Any]) -> Rows:
    heads = options["num_v_heads"]
    leaves = {"f_a_proj": "f_proj/down", "f_b_proj": "f_proj/up", "g_a_proj": "g_proj/down", "g_b_proj": "g_proj/up"}
    leaves |= {f"{name}_proj": f"{name}_proj" for name in "qkvbo"}
    return [
        *(one(f"self_attn.{name}.weight", f"mixer/{leaf}/kernel") for name, leaf in leaves.items()),
        *convolutions([f"self_attn.{name}_conv1d" for name in "qkv"]),
        one("self_attn.A_log", "mixer/A_log", shapes=((1, 1, heads, 1), (heads,))),
        one("self_attn.dt_bias", "mixer/dt_bias"),
        one("self_attn.o_norm.weight", "mixer/o_norm/scale"),
    ]


def table(config: ModelConfig) -> dict[str, Any]:
    delta, latent = first(config, "kimi_delta_attention"), first(config, "latent_attention")
    kinds = kinds_of(config, KINDS)
    if config.experts is None:
        raise Inexpressible("it has no experts")
    dense = [index for index, layer in enumerate(config.layers) if not layer.experts]
    if dense != list(range(len(dense))):
        raise Inexpressible("a layer without experts follows one with experts")
    return {
        "architectures": ["KimiLinearForCausalLM"],
        "model_type": "kimi_linear",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": latent["num_heads"],
        "num_key_value_heads": latent["num_heads"],
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.initializer_std,
        "use_cache": True,
        "linear_attn_config": {
            "full_attn_layers": [index + 1 for index, kind in enumerate(kinds) if kind == "full_attention"],
            "kda_layers": [index + 1 for index, kind in enumerate(kinds) if kind == "linear_attention"],
            "head_dim": delta["head_dim"],
            "num_heads": delta["num_heads"],
            "short_conv_kernel_size": delta["conv_size"],
        },
        **latent_table(latent),
        **routed_table(config.experts),
        "mla_use_nope": True,
        "first_k_dense_replace": len(dense),
    }


def latent_table(latent: dict[str, Any]) -> dict[str, Any]:
    names = ("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    return {name: latent[name] for name in names}


def routed_table(found: ExpertsConfig) -> dict[str, Any]:
    if found.shared_expert_size % found.expert_size:
        raise Inexpressible("the shared expert is not as wide as a number of experts")
    return {
        "moe_intermediate_size": found.expert_size,
        "num_experts": found.num_experts,
        "num_experts_per_token": found.num_experts_per_token,
        "num_shared_experts": found.shared_expert_size // found.expert_size,
        "moe_renormalize": found.normalize_weights,
        "moe_router_activation_func": found.router,
        "moe_layer_freq": 1,
        "num_expert_group": found.num_expert_groups,
        "topk_group": found.num_groups_per_token,
        "use_grouped_topk": True,
        "routed_scaling_factor": found.routed_scaling_factor,
    }


ARCHITECTURE = Architecture("transformers", config, tensors, table)
