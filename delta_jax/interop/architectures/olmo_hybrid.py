"""OLMo-Hybrid: Gated DeltaNet with norms before its layers and attention with norms after them.

Names: Allen Institute for AI, OLMo-Hybrid-7B; transformers, `olmo_hybrid`, which writes other names of the norms and cuts
the joined convolutions of a layer into three equal parts; both forms are read, the published one is written.
"""

from typing import Any

from delta_jax.interop.architectures import qwen3_next
from delta_jax.interop.architectures.common import (
    Architecture,
    Names,
    OneOf,
    Row,
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

OUTPUT_NORM_EPS = 1e-5  # in the code of the model, whatever rms_norm_eps is
TRAINING = ("linear_a_log_min", "linear_a_log_max", "linear_dt_min", "linear_dt_max", "linear_dt_init_floor")


def config(keys: Keys) -> ModelConfig:
    number = keys.layers(32)
    width = keys.get(int, "hidden_size", default=3840)
    heads = keys.get(int, "num_attention_heads", default=30)
    default = ["full_attention" if index % 4 == 3 else "linear_attention" for index in range(number)]
    if default and "full_attention" not in default:
        default[-1] = "full_attention"
    kinds = layer_kinds(keys, number, default, tuple(qwen3_next.KINDS.values()))
    keys.demand("hidden_act", "silu", default="silu")
    keys.demand("attention_bias", False, default=False)
    key_heads = keys.get(int, "linear_num_key_heads", default=heads)
    if min(key_heads, heads) < 1:
        raise keys.refuse("linear_num_key_heads", "wanted a positive integer")
    key = keys.get(int, "linear_key_head_dim", default=int(0.75 * width / key_heads))
    if key < 1:
        raise keys.refuse("linear_key_head_dim", "wanted a positive integer")
    negative = keys.get(bool, "linear_allow_neg_eigval", default=True)
    specs = {
        "linear_attention": mixer(
            "gated_delta_net",
            num_heads=key_heads,
            num_v_heads=keys.get(int, "linear_num_value_heads", default=heads),
            head_dim=key,
            expand_v=keys.get(int, "linear_value_head_dim", default=2 * key) / key,
            conv_size=keys.get(int, "linear_conv_kernel_dim", default=4),
            allow_negative_eigenvalues=True if negative else None,
            output_norm_eps=OUTPUT_NORM_EPS,
        ),
        "full_attention": mixer(
            "attention",
            norm_placement="post",
            num_heads=heads,
            num_kv_heads=keys.get(int, "num_key_value_heads", default=heads),
            head_dim=keys.get(int, "head_dim", default=width // heads),
            use_qk_norm=True,
            qk_norm_width="all",
            **_rope(keys),
        ),
    }
    found = ModelConfig(
        vocab_size=keys.get(int, "vocab_size", default=100352),
        hidden_size=width,
        **stack([specs[kind] for kind in kinds]),
        intermediate_size=keys.get(int, "intermediate_size", default=11008),
        tie_embeddings=keys.get(bool, "tie_word_embeddings", default=False),
        norm_eps=keys.get(float, "rms_norm_eps", default=1e-6),
    )
    keys.finish(TRAINING)
    return found


def _rope(keys: Keys) -> dict[str, Any]:
    """No rotation where rope_theta is null in so many words."""
    table = keys.plain("rope_parameters")
    if isinstance(table, dict) and "rope_theta" in table and table["rope_theta"] is None:
        keys.inner("rope_parameters").demand("rope_type", "default", default="default")
        return {"rope_fraction": 0.0}
    return rope_options(keys, theta=10000.0)


def tensors(config: ModelConfig, keys: Keys, there: Names) -> Tensors:
    def block(index: int) -> tuple[str, Rows]:
        options = options_of(config, spec := config.layers[index].mixer)
        rows: Rows
        if spec.mixer == "attention":
            # transformers renames what its linear layers have by the same name, and no other norm.
            after = [(_norm(name, "mixer"),) for name in ("post_attention_layernorm", "feedforward_layer_norm")]
            rows = [OneOf(tuple(after)), _norm("post_feedforward_layernorm", "mlp")]
            rows += qwen3_next.attention_rows(options)
        else:
            published = (_norm("input_layernorm", "mixer"), _norm("post_attention_layernorm", "mlp"))
            renamed = (_norm("attention_layer_norm", "mixer"), _norm("feedforward_layer_norm", "mlp"))
            rows = [OneOf((published, renamed))]
            rows += [one(f"linear_attn.{name}_proj.weight", f"mixer/{name}_proj/kernel") for name in "qkvgabo"]
            rows += convolutions([f"linear_attn.{name}_conv1d" for name in "qkv"], uneven=True)
            rows += [one(f"linear_attn.{name}", f"mixer/{name}") for name in ("A_log", "dt_bias")]
            rows.append(one("linear_attn.o_norm.weight", "mixer/o_norm/scale"))
        return f"model.layers.{index}.", [*rows, *mlp()]

    return Tensors(qwen3_next.outer(config), block)


def _norm(name: str, of: str) -> Row:
    return one(f"{name}.weight", f"{of}_norm/scale")


def table(config: ModelConfig) -> dict[str, Any]:
    attention, gated = first(config, "attention"), first(config, "gated_delta_net")
    rope: dict[str, Any] = {"rope_theta": None, "rope_type": "default"}
    return {
        "architectures": ["OlmoHybridForCausalLM"],
        "model_type": "olmo_hybrid",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.num_layers,
        "layer_types": kinds_of(config, qwen3_next.KINDS),
        "num_attention_heads": attention["num_heads"],
        "num_key_value_heads": attention["num_kv_heads"],
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": rope if attention["rope_fraction"] == 0 else rope_keys(attention),
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.initializer_std,
        "use_cache": True,
        **qwen3_next.linear_table(gated),
        "linear_allow_neg_eigval": gated["allow_negative_eigenvalues"],
    }


ARCHITECTURE = Architecture("transformers", config, tensors, table)
