"""flash-linear-attention: one decoder around DeltaNet, Gated DeltaNet, Kimi Delta Attention or (Gated) DeltaProduct.

Also its hybrids with attention, and the layouts of its older versions: both halves of a SwiGLU layer in one tensor, norms
inside the layers they precede, a parameter D that nothing uses.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from delta_jax.interop.architectures.common import (
    Architecture,
    Inexpressible,
    Names,
    OneOf,
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

# How the function is computed, not what it is.
IDLE = (
    *("attn_mode", "chunk_size", "fuse_norm", "fuse_swiglu", "fuse_cross_entropy", "fuse_linear_cross_entropy"),
    *("use_l2warp", "norm_first", "head_first", "elementwise_affine", "rescale_prenorm_residual", "training"),
)
GATES = {"swish": "silu", "silu": "silu", "sigmoid": "sigmoid"}


class Member(NamedTuple):
    """A member of the family.

    Attributes:
        architecture: the name of its class.
        spec: its keys and the width -> the mixer.
        layers: how many there are by default.
        keys: the options of the mixer -> its keys.
        projections: tensors under attn. -> leaves under mixer/.
        mixers: the names it has here.
    """

    architecture: str
    spec: Callable[[Keys, int], MixerSpec]
    layers: int
    keys: Callable[[dict[str, Any], ModelConfig], dict[str, Any]]
    projections: Callable[[dict[str, Any]], Rows]
    mixers: tuple[str, ...]


def config(keys: Keys, *, member: Member) -> ModelConfig:
    number = keys.layers(member.layers)
    width = keys.get(int, "hidden_size", default=2048)
    keys.demand("hidden_act", "swish", "silu", default="swish")
    keys.demand("attnres_block_size", None, 0, default=None)
    keys.demand("share_conv_kernel", False, default=False)
    keys.demand("use_elu", False, default=False)
    eps = keys.get(float, "norm_eps", default=1e-6)
    layers = [member.spec(keys, width)] * number
    for index, spec in attention(keys, width, number).items():
        layers[index] = spec
    inner = keys.get(int, "intermediate_size", default=None)
    ratio = keys.get(int, "hidden_ratio", default=4)
    if inner is None:
        inner = 256 * -(-int(width * ratio * 2 / 3) // 256)
    found = ModelConfig(
        vocab_size=keys.get(int, "vocab_size", default=32000),
        hidden_size=width,
        **stack(layers),
        intermediate_size=inner,
        tie_embeddings=keys.get(bool, "tie_word_embeddings", default=False),
        norm_eps=eps,
    )
    keys.finish(IDLE)
    return found


def attention(keys: Keys, width: int, number: int) -> dict[int, MixerSpec]:
    """The layers that `attn`, a table or a list of them, gives to attention."""
    given = keys.plain("attn")
    if given is None:
        return {}
    tables = given if isinstance(given, list) else [given]
    found: dict[int, MixerSpec] = {}
    for table in tables:
        if not isinstance(table, dict):
            raise keys.refuse("attn", "wanted a table, or a list of tables")
        own = Keys(table, "config.json: attn")
        heads = own.get(int, "num_heads")
        own.demand("qk_norm", False, default=False)
        own.demand("attn_type", "attn", "swa", default="attn")
        if heads < 1 or width % heads:
            raise own.refuse("num_heads", f"wanted a divisor of hidden_size {width}")
        spec = mixer(
            "attention",
            num_heads=heads,
            num_kv_heads=own.get(int, "num_kv_heads", default=heads),
            head_dim=width // heads,
            window=own.get(int, "window_size", default=None),
            rope_theta=own.get(float, "rope_theta", default=10000.0),
            use_qkv_bias=True if own.get(bool, "qkv_bias", default=False) else None,
        )
        for index in own.get(tuple[int, ...], "layers"):
            if not 0 <= index < number or index in found:
                raise own.refuse("layers", f"wanted numbers from 0 to {number - 1}, each once")
            found[index] = spec
        own.finish()
    return found


def tensors(config: ModelConfig, keys: Keys, there: Names, *, member: Member) -> Tensors:
    def block(index: int) -> tuple[str, Rows]:
        spec = config.layers[index].mixer
        options = options_of(config, spec)
        if spec.mixer == "attention":
            rows: Rows = [one(f"attn.{name}_proj.weight", f"mixer/{name}_proj/kernel") for name in "qkvo"]
            if options["use_qkv_bias"]:
                rows += [one(f"attn.{name}_proj.bias", f"mixer/{name}_proj/bias") for name in "qkv"]
        else:
            rows = [*member.projections(options | {"mixer": spec.mixer}), *shared(options)]
        joined = (
            parts("mlp.gate_proj.weight", "mlp/gate_proj/kernel", "mlp/up_proj/kernel"),
            one("mlp.down_proj.weight", "mlp/down_proj/kernel"),
        )
        return f"model.layers.{index}.", [
            OneOf(((one("attn_norm.weight", "mixer_norm/scale"),), (one("attn.norm.weight", "mixer_norm/scale"),))),
            OneOf(((one("mlp_norm.weight", "mlp_norm/scale"),), (one("mlp.norm.weight", "mlp_norm/scale"),))),
            *rows,
            OneOf((tuple(mlp()), joined)),
        ]

    outer: Rows = [
        one("model.embeddings.weight", "embed/embedding"),
        one("model.norm.weight", "final_norm/scale"),
    ]
    if not config.tie_embeddings:
        outer.append(one("lm_head.weight", "lm_head/kernel"))
    return Tensors(outer, block, r"model\.layers\.\d+\.attn\.D|.*\.rotary\.inv_freq")


def shared(options: dict[str, Any]) -> Rows:
    """What every member has."""
    rows: Rows = [one("attn.o_proj.weight", "mixer/o_proj/kernel")]
    if options.get("use_output_norm", True):
        rows.append(one("attn.o_norm.weight", "mixer/o_norm/scale"))
    if options["use_short_conv"]:
        rows += convolutions([f"attn.{name}_conv1d" for name in "qkv"])
    return rows


def linears(names: str) -> Rows:
    return [one(f"attn.{name}_proj.weight", f"mixer/{name}_proj/kernel") for name in names]


def vectors(*names: str) -> Rows:
    return [one(f"attn.{name}", f"mixer/{name}") for name in names]


def table(config: ModelConfig, *, member: Member, model_type: str) -> dict[str, Any]:
    found: dict[str, Any] = {
        "architectures": [member.architecture],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.num_layers,
        "hidden_act": "swish",
        "norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.initializer_std,
        "use_cache": True,
        "attn_mode": "chunk",
        "fuse_norm": True,
        "fuse_swiglu": True,
        "fuse_cross_entropy": True,
    }
    kinds: dict[MixerSpec, list[int]] = {}
    for index, layer in enumerate(config.layers):
        kinds.setdefault(layer.mixer, []).append(index)
    own = [spec for spec in kinds if spec.mixer in member.mixers]
    others = [spec for spec in kinds if spec.mixer not in member.mixers]
    if not own or any(spec.mixer != "attention" for spec in others):
        raise Inexpressible(f"its mixers are {', '.join(dict.fromkeys(spec.mixer for spec in kinds))}")
    found |= member.keys(options_of(config, own[0]), config)
    attn = []
    for spec in others:
        options = options_of(config, spec)
        attn.append(
            {
                "layers": kinds[spec],
                "num_heads": options["num_heads"],
                "num_kv_heads": options["num_kv_heads"],
                "qkv_bias": options["use_qkv_bias"],
                "window_size": options["window"],
                "rope_theta": options["rope_theta"],
            }
        )
    return found | {"attn": None if not attn else attn[0] if len(attn) == 1 else attn}


def _size(keys: Keys, name: str, whole: float) -> int:
    size = round(whole)
    if size < 1 or abs(size - whole) > 1e-6:
        raise keys.refuse(name, "which makes no whole number of channels a head")
    return size


def _flag(on: bool) -> bool | None:
    """True, or nothing to say."""
    return True if on else None


def _delta_net(keys: Keys, width: int) -> MixerSpec:
    heads = keys.get(int, "num_heads", default=16)
    if heads < 1:
        raise keys.refuse("num_heads", "wanted a positive integer")
    expand_k, expand_v = keys.get(float, "expand_k", default=1.0), keys.get(float, "expand_v", default=1.0)
    key = _size(keys, "expand_k", width * expand_k / heads)
    value = _size(keys, "expand_v", width * expand_v / heads)
    activation, norm = keys.get(str, "qk_activation", default="silu"), keys.get(str, "qk_norm", default="l2")
    return mixer(
        "delta_net",
        num_heads=heads,
        head_dim=key,
        expand_v=value / key,
        use_output_gate=_flag(keys.get(bool, "use_gate", default=False)),
        allow_negative_eigenvalues=_flag(keys.get(bool, "allow_neg_eigval", default=False)),
        use_short_conv=None if keys.get(bool, "use_short_conv", default=True) else False,
        conv_size=keys.get(int, "conv_size", default=4),
        use_beta=None if keys.get(bool, "use_beta", default=True) else False,
        use_output_norm=None if keys.get(bool, "use_output_norm", default=True) else False,
        qk_activation=None if activation == "silu" else activation,
        qk_norm=None if norm == "l2" else norm,
    )


def _delta_net_keys(options: dict[str, Any], config: ModelConfig) -> dict[str, Any]:
    whole = options["num_heads"] * options["head_dim"] / config.hidden_size
    return {
        "num_heads": options["num_heads"],
        "expand_k": whole,
        "expand_v": whole * options["expand_v"],
        "use_gate": options["use_output_gate"],
        "allow_neg_eigval": options["allow_negative_eigenvalues"],
        "use_short_conv": options["use_short_conv"],
        "conv_size": options["conv_size"],
        "use_beta": options["use_beta"],
        "use_output_norm": options["use_output_norm"],
        "qk_activation": options["qk_activation"],
        "qk_norm": options["qk_norm"],
    }


def _delta_net_rows(options: dict[str, Any]) -> Rows:
    return linears("qkv" + ("b" if options["use_beta"] else "") + ("g" if options["use_output_gate"] else ""))


def _head_options(keys: Keys, heads: int, head: int, expand: float) -> dict[str, Any]:
    """Heads, convolutions and eigenvalues of the three members whose keys have a head_dim."""
    head = keys.get(int, "head_dim", default=head)
    if head < 1:
        raise keys.refuse("head_dim", "wanted a positive integer")
    expand = keys.get(float, "expand_v", default=expand)
    _size(keys, "expand_v", head * expand)
    return {
        "num_heads": keys.get(int, "num_heads", default=heads),
        "head_dim": head,
        "expand_v": expand,
        "allow_negative_eigenvalues": _flag(keys.get(bool, "allow_neg_eigval", default=False)),
        "use_short_conv": None if keys.get(bool, "use_short_conv", default=True) else False,
        "conv_size": keys.get(int, "conv_size", default=4),
    }


def _head_keys(options: dict[str, Any]) -> dict[str, Any]:
    return {
        "num_heads": options["num_heads"],
        "head_dim": options["head_dim"],
        "expand_v": options["expand_v"],
        "allow_neg_eigval": options["allow_negative_eigenvalues"],
        "use_short_conv": options["use_short_conv"],
        "conv_size": options["conv_size"],
    }


def _gated_delta_net(keys: Keys, width: int) -> MixerSpec:
    activation = keys.get(str, "output_gate_activation", default="swish")
    keys.demand("output_gate_activation", *GATES, default="swish")
    return mixer(
        "gated_delta_net",
        **_head_options(keys, 6, 256, 2.0),
        num_v_heads=keys.get(int, "num_v_heads", default=None),
        use_output_gate=None if keys.get(bool, "use_gate", default=True) else False,
        output_gate_activation="sigmoid" if GATES[activation] == "sigmoid" else None,
    )


def _gated_delta_net_keys(options: dict[str, Any], config: ModelConfig) -> dict[str, Any]:
    return _head_keys(options) | {
        "num_v_heads": options["num_v_heads"],
        "use_gate": options["use_output_gate"],
        "output_gate_activation": "swish" if options["output_gate_activation"] == "silu" else "sigmoid",
    }


def _gated_delta_net_rows(options: dict[str, Any]) -> Rows:
    return linears("qkvab" + ("g" if options["use_output_gate"] else "")) + vectors("A_log", "dt_bias")


def _kda(keys: Keys, width: int) -> MixerSpec:
    bound = keys.get(float, "lower_bound", default=None)
    if keys.get(bool, "safe_gate", default=False) and bound is None:
        raise keys.refuse("safe_gate", "but lower_bound is missing")
    return mixer(
        "kimi_delta_attention",
        **_head_options(keys, 16, 128, 1.0),
        num_v_heads=keys.get(int, "num_v_heads", default=None),
        gate_lower_bound=bound if keys.get(bool, "safe_gate", default=False) else None,
    )


def _kda_keys(options: dict[str, Any], config: ModelConfig) -> dict[str, Any]:
    return _head_keys(options) | {
        "num_v_heads": options["num_v_heads"],
        "safe_gate": options["gate_lower_bound"] is not None,
        "lower_bound": options["gate_lower_bound"],
    }


def _kda_rows(options: dict[str, Any]) -> Rows:
    pairs = {"f_proj.0": "f_proj/down", "f_proj.1": "f_proj/up", "g_proj.0": "g_proj/down", "g_proj.1": "g_proj/up"}
    low_rank: Rows = [one(f"attn.{name}.weight", f"mixer/{leaf}/kernel") for name, leaf in pairs.items()]
    bias = one("attn.g_proj.1.bias", "mixer/g_proj/up/bias")
    return [*linears("qkvb"), *low_rank, bias, *vectors("A_log", "dt_bias")]


def _delta_product(keys: Keys, width: int) -> MixerSpec:
    gated = keys.get(bool, "use_forget_gate", default=False)
    return mixer(
        "gated_delta_product" if gated else "delta_product",
        **_head_options(keys, 6, 256, 2.0),
        num_householder=keys.get(int, "num_householder", default=1),
        use_output_gate=keys.get(bool, "use_output_gate", default=True),
    )


def _delta_product_keys(options: dict[str, Any], config: ModelConfig) -> dict[str, Any]:
    return _head_keys(options) | {
        "num_householder": options["num_householder"],
        "use_output_gate": options["use_output_gate"],
        "use_forget_gate": any(layer.mixer.mixer == "gated_delta_product" for layer in config.layers),
    }


def _delta_product_rows(options: dict[str, Any]) -> Rows:
    rows = linears("qkvb" + ("g" if options["use_output_gate"] else ""))
    return rows + linears("a") + vectors("A_log", "dt_bias") if options["mixer"] == "gated_delta_product" else rows


MEMBERS = {
    "delta_net": Member("DeltaNetForCausalLM", _delta_net, 24, _delta_net_keys, _delta_net_rows, ("delta_net",)),
    "gated_deltanet": Member(
        "GatedDeltaNetForCausalLM",
        _gated_delta_net,
        21,
        _gated_delta_net_keys,
        _gated_delta_net_rows,
        ("gated_delta_net",),
    ),
    # The same tensors in Idiap's class, which has sparse kinds of attention besides (arXiv 2510.20787).
    "hybrid_gated_deltanet": Member(
        "HybridGatedDeltaNetForCausalLM",
        _gated_delta_net,
        21,
        _gated_delta_net_keys,
        _gated_delta_net_rows,
        ("gated_delta_net",),
    ),
    "kda": Member("KDAForCausalLM", _kda, 24, _kda_keys, _kda_rows, ("kimi_delta_attention",)),
    "gated_deltaproduct": Member(
        "GatedDeltaProductForCausalLM",
        _delta_product,
        21,
        _delta_product_keys,
        _delta_product_rows,
        ("delta_product", "gated_delta_product"),
    ),
}
ARCHITECTURES = {
    name: Architecture(
        "fla",
        partial(config, member=member),
        partial(tensors, member=member),
        partial(table, member=member, model_type=name),
    )
    for name, member in MEMBERS.items()
}
