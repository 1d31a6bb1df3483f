"""Super Apriel: attention, with and without a window, Gated DeltaNet and Kimi Delta Attention, one of several in a layer.

A layer may hold several mixers with weights of their own; the one named by main_mixer_name is read, the others are set
aside. Names, defaults and epsilons: Fast-LLM, `apriel2` and `apriel2_text`.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from delta_jax.interop.architectures import qwen3_next
from delta_jax.interop.architectures.common import (
    Architecture,
    Names,
    Rows,
    Tensors,
    convolutions,
    mixer,
    mlp,
    one,
    options_of,
    parts,
    stack,
)
from delta_jax.interop.keys import Keys
from delta_jax.models import MixerSpec, ModelConfig


class Place(NamedTuple):
    """What a layer has.

    Attributes:
        block: its table.
        mixer: the table of the mixer that is read.
        prefix: of that mixer's tensors.
        others: names of the layer's other mixers.
    """

    block: Keys
    mixer: Keys
    prefix: str
    others: tuple[str, ...]


def config(keys: Keys) -> ModelConfig:
    head, found, widths = keys.inner("head"), [], set[int]()
    eps = _norm_eps(head.inner("normalization"), None)
    head.finish()
    for place in places(keys):
        found.append(_spec(place.mixer))
        widths.add(_width(place.block.inner("mlp")))
        _norm_eps(place.block.inner("normalization"), eps)
        place.block.finish()
    if len(widths) != 1:
        raise keys.refuse("decoder", f"whose feed-forward layers should have one width, not {sorted(widths)}")
    keys.plain("embeddings")  # how long a sequence may be
    model = ModelConfig(
        vocab_size=keys.get(int, "vocab_size", default=32000),
        hidden_size=keys.get(int, "hidden_size", default=4096),
        **stack(found),
        intermediate_size=widths.pop(),
        tie_embeddings=keys.get(bool, "tie_word_embeddings", default=False),
        norm_eps=eps,
    )
    keys.finish(("vision_encoder", "image_token_index"))
    return model


def places(keys: Keys) -> list[Place]:
    """The layers in order."""
    decoder = keys.inner("decoder")
    number, kind = decoder.get(int, "num_blocks"), decoder.get(str, "type", default="fixed")
    decoder.demand("type", "fixed", "pattern", default="fixed")
    if kind == "fixed":
        names, tables = ("block",), decoder
    else:
        names, tables = decoder.get(tuple[str, ...], "pattern"), decoder.inner("blocks")
    decoder.finish(("block", "blocks", "pattern"))
    for name in names:
        if name not in tables:
            raise tables.refuse(name, "but it should be the table of a layer")
    found = {name: _place(tables.inner(name)) for name in names}
    if not names or number < 1:
        raise keys.refuse("decoder", "wanted at least one layer")
    return [found[names[index % len(names)]] for index in range(number)]


def _place(block: Keys) -> Place:
    outer = block.inner("mixer")
    if outer.get(str, "type", default="attention") != "stochastic":
        return Place(block, outer, "mixer.", ())
    mixers = outer.plain("mixers")
    if not isinstance(mixers, Mapping) or not mixers:
        raise outer.refuse("mixers", "wanted a table of mixers")
    main = outer.get(str, "main_mixer_name", default=next(iter(mixers)))
    if main not in mixers:
        raise outer.refuse("main_mixer_name", f"but the mixers are {', '.join(mixers)}")
    outer.finish(("sampling_strategy", "sampling_weights"))
    return Place(block, outer.inner("mixers").inner(main), f"mixer.mixers.{main}.", tuple(set(mixers) - {main}))


def _norm_eps(keys: Keys, whole: float | None) -> float:
    """The epsilon of a norm; the class has one for all, that of the last norm."""
    keys.demand("type", "rms_norm", default="rms_norm")
    eps = keys.get(float, "epsilon") if whole is None else keys.get(float, "epsilon", default=whole)
    if whole is not None and eps != whole:
        raise keys.refuse("epsilon", f"but that of head.normalization is {whole}")
    keys.finish()
    return eps


def _width(keys: Keys) -> int:
    keys.demand("type", "mlp", default="mlp")
    keys.demand("activation", "silu", default="silu")
    keys.demand("gated", True, default=False)
    keys.demand("add_linear_biases", False, default=False)
    for name in ("layer_1", "layer_2"):
        _bias(keys, name, False, False)
    width = keys.get(int, "intermediate_size")
    keys.finish()
    return width


def _bias(keys: Keys, name: str, default: bool, *allowed: bool) -> bool:
    """Whether a linear layer has a bias."""
    layer = keys.inner(name)
    bias = layer.inner("bias")
    found = bias.get(bool, "enabled", default=default)
    if allowed and found not in allowed:
        raise bias.refuse("enabled", "which this library does not have there")
    bias.finish()
    layer.finish()
    return found


def _attention(keys: Keys) -> MixerSpec:
    heads, rotary = keys.get(int, "heads"), keys.inner("rotary")
    rotary.demand("type", "mistral_1d")
    keys.demand("causal", True, default=True)
    default = keys.get(bool, "add_linear_biases", default=False)
    query = _bias(keys, "query_layer", default)
    for name in ("key_layer", "value_layer"):
        _bias(keys, name, default, query)
    found = mixer(
        "attention",
        num_heads=heads,
        num_kv_heads=keys.get(int, "head_groups", default=heads),
        head_dim=keys.get(int, "head_size"),
        rope_theta=rotary.get(float, "theta"),
        window=keys.get(int, "window_size", default=None),
        use_qkv_bias=True if query else None,
        use_output_bias=True if _bias(keys, "dense_layer", default) else None,
    )
    rotary.finish()
    keys.finish(("cross_document_attention",))
    return found


def _convolution(keys: Keys, *size: int) -> int:
    keys.demand("activation", "silu", default="silu")
    taps = keys.get(int, "kernel_size", default=size[0]) if size else keys.get(int, "kernel_size")
    keys.finish()
    return taps


def _gated_delta_net(keys: Keys) -> MixerSpec:
    key = keys.get(int, "key_head_dim", default=64)
    if key < 1:
        raise keys.refuse("key_head_dim", "wanted a positive integer")
    found = mixer(
        "gated_delta_net",
        num_heads=keys.get(int, "key_heads", default=8),
        num_v_heads=keys.get(int, "value_heads", default=32),
        head_dim=key,
        expand_v=keys.get(int, "value_head_dim", default=64) / key,
        conv_size=_convolution(keys.inner("convolution_layer")),
        output_norm_eps=keys.get(float, "norm_eps", default=1e-5),
    )
    keys.finish()
    return found


def _kimi_delta_attention(keys: Keys) -> MixerSpec:
    norm = keys.inner("normalization")
    norm.demand("activation", "silu", "sigmoid", default="silu")
    found = mixer(
        "kimi_delta_attention",
        num_heads=keys.get(int, "heads", default=32),
        head_dim=keys.get(int, "head_dim", default=64),
        conv_size=_convolution(keys.inner("convolution_layer"), 4),
        output_norm_eps=norm.get(float, "epsilon", default=1e-5),
        output_gate_activation=norm.get(str, "activation", default="silu"),
        use_output_gate_bias=False,
    )
    norm.finish()
    keys.finish()
    return found


MIXERS: dict[str, Callable[[Keys], MixerSpec]] = {
    "attention": _attention,
    "gdn": _gated_delta_net,
    "kda": _kimi_delta_attention,
}


def _spec(keys: Keys) -> MixerSpec:
    keys.demand("type", *MIXERS, default="attention")
    return MIXERS[keys.get(str, "type", default="attention")](keys)


def tensors(config: ModelConfig, keys: Keys, there: Names) -> Tensors:
    layers = places(keys)

    def block(index: int) -> tuple[str, Rows]:
        spec = config.layers[index].mixer
        rows = ROWS[spec.mixer](options_of(config, spec), layers[index].prefix)
        return f"model.decoder.blocks.{index}.", [*qwen3_next.norms(config), *rows, *mlp()]

    aside = [r"model\.vision_encoder\..*"]
    for index, layer in enumerate(layers):
        if layer.others:
            others = "|".join(map(re.escape, layer.others))
            aside.append(rf"model\.decoder\.blocks\.{index}\.mixer\.mixers\.({others})\..*")
    return Tensors(qwen3_next.outer(config), block, "|".join(aside))


def gated_delta_rows(options: dict[str, Any], prefix: str) -> Rows:
    return [
        parts(f"{prefix}in_proj_qkvz.weight", *(f"mixer/{name}_proj/kernel" for name in "qkvg")),
        parts(f"{prefix}in_proj_ba.weight", *(f"mixer/{name}_proj/kernel" for name in "ba")),
        parts(f"{prefix}convolution.weight", *(f"mixer/{name}_conv/kernel" for name in "qkv")),
        *_vectors(prefix),
        one(f"{prefix}out_proj.weight", "mixer/o_proj/kernel"),
    ]


def kimi_delta_rows(options: dict[str, Any], prefix: str) -> Rows:
    leaves = {"f_a_proj": "f_proj/down", "f_b_proj": "f_proj/up", "g_a_proj": "g_proj/down", "g_b_proj": "g_proj/up"}
    leaves |= {f"{name}_proj": f"{name}_proj" for name in "qkvo"} | {"beta_proj": "b_proj"}
    return [
        *(one(f"{prefix}{name}.weight", f"mixer/{leaf}/kernel") for name, leaf in leaves.items()),
        *convolutions([f"{prefix}{name}_conv" for name in "qkv"]),
        *_vectors(prefix),
    ]


def _vectors(prefix: str) -> Rows:
    names = {"A_log": "A_log", "dt_bias": "dt_bias", "norm.weight": "o_norm/scale"}
    return [one(f"{prefix}{name}", f"mixer/{leaf}") for name, leaf in names.items()]


ROWS = {
    "attention": qwen3_next.attention_rows,
    "gated_delta_net": gated_delta_rows,
    "kimi_delta_attention": kimi_delta_rows,
}
ARCHITECTURE = Architecture("transformers", config, tensors)
