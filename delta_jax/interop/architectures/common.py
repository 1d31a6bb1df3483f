"""What the architectures share: their record, stacks of layers, rows of feed-forward layers, and options read back."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from flax import nnx

from delta_jax.interop.keys import Keys
from delta_jax.interop.layout import OneOf, Row
from delta_jax.layers import Mixer, find_mixer
from delta_jax.models import ModelConfig
from delta_jax.models.config import LayerOverride, MixerSpec

type Rows = list[Row | OneOf]
type Names = Mapping[str, tuple[int, ...]] | None


class Tensors(NamedTuple):
    """The rows of a checkpoint: outside the blocks, and of a layer by its number, with the prefix of their names.

    `aside` is a pattern of names of tensors that take no part in the text model's function.
    """

    outer: Rows
    block: Callable[[int], tuple[str, Rows]]
    aside: str = "(?!)"


class Architecture(NamedTuple):
    """A published kind of model, in both directions.

    Attributes:
        family: whose format it is: "transformers" or "fla".
        config: the keys of its config.json -> the model; refuses what cannot be expressed.
        tensors: the model, those keys and the shapes of the tensors there (None: none yet) -> what the tensors hold.
        table: the model -> a config.json; may give one that means another model, which the caller finds out by
            reading it. None: models are only written in the form in which they were read.
    """

    family: str
    config: Callable[[Keys], ModelConfig]
    tensors: Callable[[ModelConfig, Keys, Names], Tensors]
    table: Callable[[ModelConfig], dict[str, Any]] | None = None


class Inexpressible(ValueError):
    """A model that an architecture does not have."""


def model_of(architecture: Architecture, keys: Keys) -> ModelConfig:
    """The model that an architecture makes of the keys of a config.json.

    Raises:
        ValueError: a key cannot be expressed, or is missing.
    """
    model = architecture.config(keys)
    if model.mlp_width == 0 and not all(layer.experts for layer in model.layers):
        raise ValueError("intermediate_size is 0, but no published class leaves the feed-forward layer out")
    return model


def one(tensor: str, leaf: str, **options: Any) -> Row:
    """A tensor that holds a leaf."""
    return Row((tensor,), (leaf,), **options)


def parts(tensor: str, *leaves: str, **options: Any) -> Row:
    """A tensor that holds several leaves."""
    return Row((tensor,), leaves, **options)


def mixer(name: str, norm_placement: str = "pre", **options: Any) -> MixerSpec:
    """A layer's mixer; options that are None are left out."""
    given = tuple((key, value) for key, value in options.items() if value is not None)
    return MixerSpec(mixer=name, options=given, norm_placement=norm_placement)


def stack(layers: Sequence[MixerSpec]) -> dict[str, Any]:
    """`pattern` and `layer_overrides` of a stack: the shortest description of it."""

    def described(period: int) -> tuple[tuple[MixerSpec, ...], dict[MixerSpec, list[int]]]:
        pattern, others = [], dict[MixerSpec, list[int]]()
        for place in range(period):
            column = layers[place::period]
            pattern.append(max(dict.fromkeys(column), key=column.count))
        for index, layer in enumerate(layers):
            if layer != pattern[index % period]:
                others.setdefault(layer, []).append(index)
        return tuple(pattern), others

    found = [described(period) for period in range(1, min(len(layers), 64) + 1)]
    pattern, others = min(found, key=lambda pair: len(pair[0]) + sum(map(len, pair[1].values())))
    overrides = tuple(
        LayerOverride(
            mixer=layer.mixer, options=layer.options, norm_placement=layer.norm_placement, layers=tuple(indices)
        )
        for layer, indices in others.items()
    )
    return {"num_layers": len(layers), "pattern": pattern, "layer_overrides": overrides}


def mlp(prefix: str = "mlp.", leaf: str = "mlp/", names: Sequence[str] = ("gate_proj", "up_proj", "down_proj")) -> Rows:
    """A SwiGLU layer."""
    leaves = ("gate_proj", "up_proj", "down_proj")
    return [one(f"{prefix}{name}.weight", f"{leaf}{own}/kernel") for name, own in zip(names, leaves, strict=True)]


def experts(
    prefix: str = "mlp.experts.", names: Sequence[str] = ("gate_proj", "up_proj", "down_proj"), *, fused: bool = False
) -> Rows:
    """The experts of a layer, one tensor each; "fused" says that all in one tensor is the published form."""
    own = ("gate_proj", "up_proj", "down_proj")
    single = tuple(
        one(f"{prefix}{{}}.{name}.weight", f"mlp/experts/{leaf}") for name, leaf in zip(names, own, strict=True)
    )
    joined = (
        parts(f"{prefix}gate_up_proj", "mlp/experts/gate_proj", "mlp/experts/up_proj"),
        one(f"{prefix}down_proj", "mlp/experts/down_proj"),
    )
    return [OneOf((joined, single) if fused else (single, joined))]


def convolutions(names: Sequence[str] = ("q_conv1d", "k_conv1d", "v_conv1d"), **options: Any) -> Rows:
    """The short convolutions, a tensor each."""
    leaves = ("mixer/q_conv/kernel", "mixer/k_conv/kernel", "mixer/v_conv/kernel")
    if options:
        return [Row(tuple(f"{name}.weight" for name in names), leaves, **options)]
    return [one(f"{name}.weight", leaf) for name, leaf in zip(names, leaves, strict=True)]


def norm_name(zero_centered: bool) -> str:
    return "offset" if zero_centered else "scale"


def options_of(config: ModelConfig, spec: MixerSpec) -> dict[str, Any]:
    """All options of a layer's mixer, defaults and what follows from others filled in."""
    return dict(_options_of(config.hidden_size, config.norm_eps, spec))


@functools.cache
def _options_of(width: int, norm_eps: float, spec: MixerSpec) -> dict[str, Any]:
    kind: Any = find_mixer(spec.mixer)
    own = inspect.signature(kind.__init__).parameters.values()
    found = {p.name: p.default for p in own if p.default is not p.empty} | dict(spec.options)
    if issubclass(kind, Mixer):  # only the layer knows what it hands on
        layer = nnx.eval_shape(lambda: kind(width, norm_eps=norm_eps, **dict(spec.options), rngs=nnx.Rngs(0)))
        found |= vars(layer.settings)
    heads = found.get("num_heads", 1)
    follows = {
        "head_dim": width // heads,
        "num_v_heads": heads,
        "num_kv_heads": heads,
        "output_norm_eps": norm_eps,
        "kv_norm_eps": norm_eps,
    }
    found |= {name: value for name, value in follows.items() if name in found and found[name] is None}
    return {name: value for name, value in found.items() if name not in _NOT_FUNCTION}


_NOT_FUNCTION = (
    *("hidden_size", "norm_eps", "initializer_std", "dtype", "param_dtype"),
    *("chunk_size", "implementation"),
)


def function_of(config: ModelConfig) -> dict[str, Any]:
    """What of a configuration its function depends on, in one form."""
    layers = [
        {"mixer": layer.mixer.mixer, "norm_placement": layer.mixer.norm_placement, **options_of(config, layer.mixer)}
        | {"experts": layer.experts}
        for layer in config.layers
    ]
    table = {name: getattr(config, name) for name in ("vocab_size", "hidden_size", "norm_eps", "zero_centered_norms")}
    table |= {"tie_embeddings": config.tie_embeddings, "layers": layers}
    if any(not layer.experts for layer in config.layers):
        table["intermediate_size"] = config.mlp_width
    if config.experts is not None and any(layer.experts for layer in config.layers):
        table["experts"] = dataclasses.asdict(config.experts) | {"balance_rate": 0.0}
    return table


def first(config: ModelConfig, *mixers: str) -> dict[str, Any]:
    """The options of the first layer with one of these mixers.

    Raises:
        Inexpressible: there is none.
    """
    for layer in config.layers:
        if layer.mixer.mixer in mixers:
            return options_of(config, layer.mixer)
    raise Inexpressible(f"it has no {' or '.join(mixers)}")


def kinds_of(config: ModelConfig, kinds: Mapping[str, str]) -> list[str]:
    """What the architecture calls each layer, by its mixer.

    Raises:
        Inexpressible: a mixer is none of its.
    """
    for layer in config.layers:
        if layer.mixer.mixer not in kinds:
            raise Inexpressible(f"it has the mixer {layer.mixer.mixer}")
    return [kinds[layer.mixer.mixer] for layer in config.layers]
