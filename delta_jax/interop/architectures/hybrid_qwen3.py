"""Amazon's primed hybrids: Qwen3 in which Gated DeltaNet or windows have taken the place of some of the attention.

Keys and values have fewer heads than queries and are repeated after the convolution; here the repeated heads are
parameters of their own, which must still be equal to be written back.

Names and defaults: the training code of hybrid-model-factory, `hybrid_qwen3`.
"""

from typing import Any

from delta_jax.interop.architectures import qwen3_next
from delta_jax.interop.architectures.common import (
    Architecture,
    Names,
    Row,
    Rows,
    Tensors,
    mixer,
    mlp,
    one,
    options_of,
    stack,
)
from delta_jax.interop.keys import Keys, rope_options
from delta_jax.models import MixerSpec, ModelConfig

PREFIXES = {"*": "self_attn.", "SWA": "swa.", "GDN": "gdn."}


def config(keys: Keys) -> ModelConfig:
    kinds, specs = layers(keys), {}
    width, heads = keys.get(int, "hidden_size", default=4096), keys.get(int, "num_attention_heads", default=32)
    kv_heads = keys.get(int, "num_key_value_heads", default=32)
    if kv_heads < 1 or heads % kv_heads:
        raise keys.refuse("num_key_value_heads", f"wanted a divisor of num_attention_heads {heads}")
    keys.demand("hidden_act", "silu", default="silu")
    keys.demand("use_sliding_window", False, default=False)
    head = keys.get(int, "head_dim", default=128)
    bias = keys.get(bool, "attention_bias", default=False)
    attention = {
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head,
        "use_qk_norm": True,
        **({"use_qkv_bias": True, "use_output_bias": True} if bias else {}),
        **rope_options(keys, theta=10000.0),
    }
    specs["*"] = mixer("attention", **attention)
    if "SWA" in kinds:
        specs["SWA"] = mixer("attention", **attention, window=keys.inner("swa_config").get(int, "window_size"))
    specs["GDN"] = gated_delta_net(keys.inner("gdn_config"), width, heads, kv_heads, head)
    found = ModelConfig(
        vocab_size=keys.get(int, "vocab_size", default=151936),
        hidden_size=width,
        **stack([specs[kind] for kind in kinds]),
        intermediate_size=keys.get(int, "intermediate_size", default=22016),
        tie_embeddings=keys.get(bool, "tie_word_embeddings", default=False),
        norm_eps=keys.get(float, "rms_norm_eps", default=1e-6),
    )
    others = ("mamba2_config", "bmojo_config", "gka_config", "swa_config")
    keys.finish(("max_window_layers", "sliding_window", "layer_types", *others))
    return found


def layers(keys: Keys) -> list[str]:
    """The kind of each layer; a stroke stands between two of them."""
    kinds = [kind for kind in keys.get(str, "hybrid_override_pattern").split("-") if kind]
    for kind in kinds:
        if kind not in PREFIXES:
            raise keys.refuse("hybrid_override_pattern", f"but of its layers only {', '.join(PREFIXES)} are known here")
    number = keys.layers(32)
    if len(kinds) != number:
        raise keys.refuse("hybrid_override_pattern", f"of {len(kinds)} layers, but num_hidden_layers is {number}")
    return kinds


def gated_delta_net(keys: Keys, width: int, heads: int, kv_heads: int, head: int) -> MixerSpec:
    """The linear layers, from the table gdn_config; its sizes are those of attention."""
    sizes = {
        "hidden_size": width,
        "head_dim": head,
        "num_q_heads": heads,
        "num_k_heads": kv_heads,
        "num_v_heads": kv_heads,
    }
    for name, size in sizes.items():
        keys.demand(name, size, default=size)
    keys.demand("kv_proj_rank", None)
    found = mixer(
        "gated_delta_net",
        num_heads=heads,
        head_dim=head,
        expand_v=1.0,
        use_output_gate=None if keys.get(bool, "use_gate", default=True) else False,
        allow_negative_eigenvalues=True if keys.get(bool, "allow_neg_eigval", default=False) else None,
        use_short_conv=None if keys.get(bool, "use_short_conv", default=True) else False,
        conv_size=keys.get(int, "conv_size", default=4),
        conv_bias=True if keys.get(bool, "conv_bias", default=False) else None,
        output_norm_eps=keys.get(float, "norm_eps", default=1e-5),
    )
    keys.finish(("kv_learnable_residual",))
    return found


def tensors(config: ModelConfig, keys: Keys, there: Names) -> Tensors:
    kinds, kv_heads = layers(keys), keys.get(int, "num_key_value_heads", default=32)

    def block(index: int) -> tuple[str, Rows]:
        options, kind = options_of(config, config.layers[index].mixer), kinds[index]
        rows = delta_rows(options, kv_heads) if kind == "GDN" else qwen3_next.attention_rows(options, PREFIXES[kind])
        return f"model.layers.{index}.", [*qwen3_next.norms(config), *rows, *mlp()]

    return Tensors(qwen3_next.outer(config), block)


def delta_rows(options: dict[str, Any], kv_heads: int) -> Rows:
    names = {"a": "gk", "b": "b", "o": "o"} | ({"g": "g"} if options["use_output_gate"] else {})
    rows: Rows = [one(f"gdn.{name}_proj.weight", f"mixer/{leaf}_proj/kernel") for leaf, name in names.items()]
    for name in "qkv":
        held = {} if name == "q" else {"groups": kv_heads, "copies": options["num_heads"] // kv_heads}
        rows.append(Row((f"gdn.{name}_proj.weight",), (f"mixer/{name}_proj/kernel",), **held))
        if options["use_short_conv"]:
            rows.append(Row((f"gdn.{name}_conv1d.weight",), (f"mixer/{name}_conv/kernel",), **held))
        if options["use_short_conv"] and options["conv_bias"]:
            rows.append(Row((f"gdn.{name}_conv1d.bias",), (f"mixer/{name}_conv/bias",), **held))
    rows += [one(f"gdn.{name}", f"mixer/{name}") for name in ("A_log", "dt_bias")]
    return [*rows, one("gdn.o_norm.weight", "mixer/o_norm/scale")]


ARCHITECTURE = Architecture("transformers", config, tensors)
