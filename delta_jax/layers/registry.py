"""The mixers that a configuration can name: ours by a short name, anyone's by the path of its class."""

import importlib
import inspect
from typing import Any, Unpack, get_type_hints

from delta_jax.config import did_you_mean
from delta_jax.layers.attention import Attention
from delta_jax.layers.delta_net import DeltaNet
from delta_jax.layers.delta_product import DeltaProduct, GatedDeltaProduct
from delta_jax.layers.gated_delta_net import GatedDeltaNet
from delta_jax.layers.gated_delta_net_2 import GatedDeltaNet2
from delta_jax.layers.gated_linear_attention import GatedLinearAttention
from delta_jax.layers.kaczmarz import KaczmarzLinearAttention
from delta_jax.layers.kimi_delta_attention import KimiDeltaAttention
from delta_jax.layers.latent_attention import LatentAttention
from delta_jax.layers.linear_attention import LinearAttention, RetNet
from delta_jax.layers.mamba2 import Mamba2
from delta_jax.layers.mixer import Mixer
from delta_jax.layers.options import MixerOptions
from delta_jax.layers.token_mixer import TokenMixer

__all__ = ["MIXERS", "find_mixer", "mixer_options"]

GIVEN_BY_MODEL = ("norm_eps", "initializer_std", "dtype", "param_dtype", "rngs")
_TO_DEFINE = (TokenMixer.init_cache, TokenMixer.with_cache, Mixer.rule_inputs)

MIXERS: dict[str, type[TokenMixer]] = {
    "attention": Attention,
    "delta_net": DeltaNet,
    "delta_product": DeltaProduct,
    "gated_delta_net": GatedDeltaNet,
    "gated_delta_net_2": GatedDeltaNet2,
    "gated_delta_product": GatedDeltaProduct,
    "gated_linear_attention": GatedLinearAttention,
    "kaczmarz_linear_attention": KaczmarzLinearAttention,
    "kimi_delta_attention": KimiDeltaAttention,
    "latent_attention": LatentAttention,
    "linear_attention": LinearAttention,
    "mamba2": Mamba2,
    "retnet": RetNet,
}


def find_mixer(name: str) -> type[TokenMixer]:
    """The mixer that a configuration names.

    Args:
        name: a key of `MIXERS`, or where Python imports the class from: "package.module:Class", or with a dot in place
            of the colon.

    Returns:
        The class.

    Raises:
        ValueError: there is no such name, nothing can be imported from there, or it is not a subclass of `TokenMixer`.

    Examples:
        >>> find_mixer("delta_net").__name__
        'DeltaNet'
        >>> find_mixer("delta_jax.layers.delta_net:DeltaNet") is find_mixer("delta_net")
        True
    """
    if isinstance(name, str) and name in MIXERS:
        return MIXERS[name]
    if not isinstance(name, str) or not ("." in name or ":" in name):
        known, hint = ", ".join(sorted(MIXERS)), did_you_mean(str(name), MIXERS)
        raise ValueError(f'mixer must be one of {known}, or "package.module:Class", got {name!r}{hint}')
    module, _, attribute = name.rpartition(":" if ":" in name else ".")
    try:
        mixer = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # the module runs here, and whatever it raises is what its author wants to read
        reason = str(error) if isinstance(error, ImportError | AttributeError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"mixer {name!r} cannot be imported: {reason}") from error
    if not isinstance(mixer, type) or not issubclass(mixer, TokenMixer):
        raise ValueError(f"mixer {name!r} must be a subclass of delta_jax.layers.TokenMixer, such as Mixer")
    missing = [method.__name__ for method in _TO_DEFINE if getattr(mixer, method.__name__, None) is method]
    if missing:
        raise ValueError(f"mixer {name!r} must define {' and '.join(missing)}")
    return mixer


def mixer_options(name: str) -> dict[str, Any]:
    """The keyword arguments of a mixer that a configuration may set, and their types.

    A class that takes any keyword hands it on: to `MixerSettings` if it says `Unpack[MixerOptions]`, else to the class
    it is derived from. What has no type, or one that only a type checker knows, may be anything.

    Raises:
        ValueError: see `find_mixer`.

    Examples:
        >>> "num_heads" in mixer_options("delta_net"), "gate_lower_bound" in mixer_options("kimi_delta_attention")
        (True, True)
    """
    options: dict[str, Any] = {}
    for cls in find_mixer(name).__mro__:
        if cls is Mixer:
            return _join(options, get_type_hints(MixerOptions))
        if "__init__" not in vars(cls):
            continue
        _, _, *own = inspect.signature(vars(cls)["__init__"]).parameters.values()  # self and the width come first
        try:
            hints = get_type_hints(vars(cls)["__init__"])
        except Exception:  # such as a name that is imported for a type checker alone: what is no string is known
            hints = {p.name: p.annotation for p in own if not isinstance(p.annotation, str) and p.annotation != p.empty}
        options = _join(options, {p.name: hints.get(p.name, Any) for p in own if p.kind is not p.VAR_KEYWORD})
        rest = [hints.get(p.name) for p in own if p.kind is p.VAR_KEYWORD]
        if rest == [Unpack[MixerOptions]]:
            return _join(options, get_type_hints(MixerOptions))
        if not rest:
            break
    return options


def _join(options: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    return options | {name: hint for name, hint in more.items() if name not in (*options, *GIVEN_BY_MODEL)}
