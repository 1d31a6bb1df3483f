"""Amazon's primed hybrids: Qwen3 in which Gated DeltaNet has taken the place of some of the attention.

Keys and values have fewer heads than queries and are repeated after the convolution; here the repeated heads are
parameters of their own, which must still be equal to be written back.
"""

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
from delta_jax.models import ModelConfig

OUTPUT_NORM_EPS = 1e-5
KINDS = {"*": "attention", "GDN": "gated_delta_net"}


def config(keys: Keys) -> ModelConfig:
    number = keys.layers(36)
    pattern = keys.get(str, "hybrid_override_pattern")
    kinds = [kind for kind in pattern.split("-") if kind]
    for kind in kinds:
        if kind not in KINDS:
            raise keys.refuse("hybrid_override_pattern", f"but of its layers only {' and '.join(KINDS)} are known here")
    if len(kinds) != number:
        raise keys.refuse("hybrid_override_pattern", f"of {len(kinds)} layers, but num_hidden_layers is {number}")
    keys.demand("hidden_act", "silu", default="silu")
    keys.demand("attention_bias", False, default=False)
    keys.demand("use_sliding_window", False, default=False)
    heads, head = keys.get(int, "num_attention_heads", default=32), keys.get(int, "head_dim", default=128)
    kv_heads = keys.get(int, "num_key_value_heads", default=8)
    if kv_heads < 1 or heads % kv_heads:
        raise keys.refuse("num_key_value_heads", f"wanted a divisor of num_attention_heads, {heads}")
    specs = {
        "*": mixer(
            "attention",
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head,
            use_qk_norm=True,
            **rope_options(keys, theta=10000.0),
        ),
        "GDN": mixer(
            "gated_delta_net",
            num_heads=heads,
            head_dim=head,
            expand_v=1.0,
            conv_size=keys.get(int, "conv_size", "gdn_conv_size", default=4),
            output_norm_eps=OUTPUT_NORM_EPS,
        ),
    }
    found = ModelConfig(
        vocab_size=keys.get(int, "vocab_size", default=151936),
        hidden_size=keys.get(int, "hidden_size", default=4096),
        **stack([specs[kind] for kind in kinds]),
        intermediate_size=keys.get(int, "intermediate_size", default=12288),
        tie_embeddings=keys.get(bool, "tie_word_embeddings", default=False),
        norm_eps=keys.get(float, "rms_norm_eps", default=1e-6),
    )
    keys.finish(("max_window_layers", "sliding_window", "layer_types"))
    return found


def tensors(config: ModelConfig, keys: Keys, there: Names) -> Tensors:
    kv_heads = keys.get(int, "num_key_value_heads", default=8)

    def block(index: int) -> tuple[str, Rows]:
        options = options_of(config, spec := config.layers[index].mixer)
        if spec.mixer == "attention":
            rows = qwen3_next.attention_rows(options)
        else:
            copies = options["num_heads"] // kv_heads
            names = {"q": "q", "a": "gk", "b": "b", "g": "g", "o": "o"}
            rows = [one(f"gdn.{name}_proj.weight", f"mixer/{leaf}_proj/kernel") for leaf, name in names.items()]
            rows.append(one("gdn.q_conv1d.weight", "mixer/q_conv/kernel"))
            for name in "kv":
                repeated = {"groups": kv_heads, "copies": copies}
                rows.append(Row((f"gdn.{name}_proj.weight",), (f"mixer/{name}_proj/kernel",), **repeated))
                rows.append(Row((f"gdn.{name}_conv1d.weight",), (f"mixer/{name}_conv/kernel",), **repeated))
            rows += [one(f"gdn.{name}", f"mixer/{name}") for name in ("A_log", "dt_bias")]
            rows.append(one("gdn.o_norm.weight", "mixer/o_norm/scale"))
        return f"model.layers.{index}.", [*qwen3_next.norms(config), *rows, *mlp()]

    return Tensors(qwen3_next.outer(config), block)


ARCHITECTURE = Architecture("transformers", config, tensors)
