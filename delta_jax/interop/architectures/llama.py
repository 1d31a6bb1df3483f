"""Llama, Mistral, Qwen2 and Qwen3: attention alone, from which delta-rule hybrids are converted.

Names and defaults: transformers, `llama`, `mistral`, `qwen2` and `qwen3`.
"""

from functools import partial
from typing import Any, Literal, NamedTuple

from delta_jax.interop.architectures import qwen3_next
from delta_jax.interop.architectures.common import (
    Architecture,
    Inexpressible,
    Names,
    Rows,
    Tensors,
    first,
    kinds_of,
    mixer,
    mlp,
    options_of,
    stack,
)
from delta_jax.interop.keys import Keys, layer_kinds, rope_keys, rope_options
from delta_jax.models import ModelConfig

FULL, SLIDING = "full_attention", "sliding_attention"


class Donor(NamedTuple):
    """One of them.

    Attributes:
        architecture: the name of its class.
        vocabulary, inner: defaults of vocab_size and intermediate_size.
        kv_heads, head_dim: of num_key_value_heads and head_dim; None follows from the other keys.
        bias: what has one: the projections of queries, keys and values, all four if attention_bias says so, or nothing.
        windows: in no layer, in those that layer_types or max_window_layers give one, or in all.
        qk_norm: whether queries and keys are normalised, head by head.
    """

    architecture: str
    vocabulary: int
    inner: int
    kv_heads: int | None = None
    head_dim: int | None = None
    bias: Literal["qkv", "key", "none"] = "none"
    windows: Literal["none", "some", "all"] = "none"
    qk_norm: bool = False


def config(keys: Keys, *, donor: Donor) -> ModelConfig:
    number = keys.layers(32)
    width = keys.get(int, "hidden_size", default=4096)
    heads = keys.get(int, "num_attention_heads", default=32)
    keys.demand("hidden_act", "silu", default="silu")
    keys.demand("mlp_bias", False, default=False)
    keys.demand("use_mrope", False, default=False)
    if heads < 1:
        raise keys.refuse("num_attention_heads", "wanted a positive integer")
    options = {
        "num_heads": heads,
        "num_kv_heads": keys.get(int, "num_key_value_heads", default=donor.kv_heads or heads),
        "head_dim": keys.get(int, "head_dim", default=donor.head_dim or width // heads),
        **rope_options(keys, theta=10000.0),
        **({"use_qk_norm": True} if donor.qk_norm else {}),
        **_biases(keys, donor),
    }
    window, kinds = _windows(keys, donor, number)
    specs = {FULL: mixer("attention", **options), SLIDING: mixer("attention", **options, window=window)}
    found = ModelConfig(
        vocab_size=keys.get(int, "vocab_size", default=donor.vocabulary),
        hidden_size=width,
        **stack([specs[kind] for kind in kinds]),
        intermediate_size=keys.get(int, "intermediate_size", default=donor.inner),
        tie_embeddings=keys.get(bool, "tie_word_embeddings", default=False),
        norm_eps=keys.get(float, "rms_norm_eps", default=1e-6),
    )
    keys.finish()
    return found


def _biases(keys: Keys, donor: Donor) -> dict[str, bool]:
    if donor.bias == "qkv":
        keys.demand("attention_bias", True, default=True)
        return {"use_qkv_bias": True}
    if donor.bias == "none":
        keys.demand("attention_bias", False, default=False)
        return {}
    bias = keys.get(bool, "attention_bias", default=False)
    return {"use_qkv_bias": True, "use_output_bias": True} if bias else {}


def _windows(keys: Keys, donor: Donor, number: int) -> tuple[int | None, tuple[str, ...]]:
    """The window, and the kind of each layer."""
    if donor.windows == "none":
        return None, layer_kinds(keys, number, [FULL] * number, [FULL])
    window = keys.get(int, "sliding_window", default=4096)
    if donor.windows == "all":
        everywhere = FULL if "sliding_window" in keys and keys.plain("sliding_window") is None else SLIDING
        return window, layer_kinds(keys, number, [everywhere] * number, [everywhere])
    whole = keys.get(int, "max_window_layers", default=28)
    null = "sliding_window" in keys and keys.plain("sliding_window") is None
    used = keys.get(bool, "use_sliding_window", default=False) and not null
    kinds = [SLIDING if used and index >= whole else FULL for index in range(number)]
    found = layer_kinds(keys, number, kinds, (FULL, SLIDING))
    if SLIDING in found and not used:
        raise keys.refuse("layer_types", "but by use_sliding_window and sliding_window there is no window")
    return window, found


def tensors(config: ModelConfig, keys: Keys, there: Names) -> Tensors:
    def block(index: int) -> tuple[str, Rows]:
        rows = qwen3_next.attention_rows(options_of(config, config.layers[index].mixer))
        return f"model.layers.{index}.", [*qwen3_next.norms(config), *rows, *mlp()]

    return Tensors(qwen3_next.outer(config), block)


def table(config: ModelConfig, *, donor: Donor, model_type: str) -> dict[str, Any]:
    kinds_of(config, {"attention": FULL})
    options = first(config, "attention")
    if options["use_qk_norm"] != donor.qk_norm:
        raise Inexpressible("its queries and keys are " + ("not normalised" if donor.qk_norm else "normalised"))
    found = {
        "architectures": [donor.architecture],
        "model_type": model_type,
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
        "attention_dropout": 0.0,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.initializer_std,
        "use_cache": True,
    }
    if donor.bias == "key":
        found["attention_bias"] = options["use_qkv_bias"]
    if donor.architecture == "LlamaForCausalLM":
        found["mlp_bias"] = False
    windows = [options_of(config, layer.mixer)["window"] for layer in config.layers]
    window = next((one for one in windows if one is not None), None)
    if donor.windows == "all":
        found["sliding_window"] = window
    elif donor.windows == "some":
        kinds = [FULL if one is None else SLIDING for one in windows]
        found |= {
            "layer_types": kinds,
            "use_sliding_window": window is not None,
            "sliding_window": window,
            "max_window_layers": kinds.index(SLIDING) if window is not None else config.num_layers,
        }
    return found


DONORS = {
    "llama": Donor("LlamaForCausalLM", 32000, 11008, bias="key"),
    "qwen3": Donor("Qwen3ForCausalLM", 151936, 22016, 32, 128, bias="key", windows="some", qk_norm=True),
    "qwen2": Donor("Qwen2ForCausalLM", 151936, 22016, 32, bias="qkv", windows="some"),
    "mistral": Donor("MistralForCausalLM", 32000, 14336, 8, windows="all"),
}
ARCHITECTURES = {
    name: Architecture(
        "transformers", partial(config, donor=donor), tensors, partial(table, donor=donor, model_type=name)
    )
    for name, donor in DONORS.items()
}
