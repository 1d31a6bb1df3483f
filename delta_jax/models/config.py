"""What a language model is made of, as frozen data."""

import dataclasses
import inspect
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
from flax import nnx

from delta_jax.config import convert, did_you_mean, meanings_of
from delta_jax.layers import MixtureOfExperts, TokenMixer, find_mixer
from delta_jax.layers.checks import (
    require_counts,
    require_flags,
    require_positive_integers,
    require_positive_numbers,
)
from delta_jax.layers.options import MixerSettings
from delta_jax.layers.registry import GIVEN_BY_MODEL, mixer_options
from delta_jax.models.stack import Run, cut_into_runs
from delta_jax.parallel import AXES, ParameterRule, path_string

__all__ = ["ExpertsConfig", "Layer", "LayerOverride", "MixerSpec", "ModelConfig"]

DTYPES = ("float32", "bfloat16", "float16")
REMAT_POLICIES = ("none", "dots", "block")
NORM_PLACEMENTS = ("pre", "post")
RESIDUALS = ("delta_rule_states", "delta_rule_output", "mixer_output")


@dataclass(frozen=True, kw_only=True)
class MixerSpec:
    """One mixer of the repeating pattern.

    Attributes:
        mixer: a key of `delta_jax.layers.MIXERS`, or "package.module:Class" for a mixer from outside.
        options: keyword arguments of that layer as (name, value) pairs; some the model itself sets.
        norm_placement: where the norms of the block are, "pre", x + mixer(norm(x)) and likewise for the feed-forward layer,
            or "post", x + norm(mixer(x)).

    Examples:
        >>> MixerSpec(mixer="gated_delta_net", options=(("num_heads", 2), ("expand_v", 2.0))).mixer
        'gated_delta_net'
    """

    mixer: str
    options: tuple[tuple[str, Any], ...] = ()
    norm_placement: str = "pre"

    def __post_init__(self) -> None:
        if self.norm_placement not in NORM_PLACEMENTS:
            raise ValueError(f"norm_placement must be one of pre, post, got {self.norm_placement!r}")
        known = mixer_options(self.mixer)
        if not _are_pairs(self.options):
            raise ValueError(self._wanted())
        for name, _ in self.options:
            if name not in known:
                raise ValueError(
                    f"mixer {self.mixer!r} has no option {name!r}{did_you_mean(name, known)}, only {', '.join(known)}"
                )
        names = [name for name, _ in self.options]
        if len(set(names)) < len(names):
            raise ValueError(f"options of mixer {self.mixer!r} name a key twice: {', '.join(names)}")
        options = tuple((name, _frozen(convert(known[name], value, name))) for name, value in self.options)
        if not all(isinstance(value, Hashable) for _, value in options):
            raise ValueError(self._wanted())
        object.__setattr__(self, "options", options)
        given = dict.fromkeys(GIVEN_BY_MODEL) | dict(options)
        try:
            inspect.signature(find_mixer(self.mixer).__init__).bind(None, 1, **given)
        except TypeError as error:
            wanted = ", ".join(GIVEN_BY_MODEL)
            raise ValueError(
                f"mixer {self.mixer!r}: {error} (models give a width, {wanted} and the options)"
            ) from error

    def _wanted(self) -> str:
        return (
            f"options of mixer {self.mixer!r} must be a tuple of (name, value) pairs that can be hashed, such as"
            f" (('num_heads', 4),), got {self.options!r}"
        )

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> "MixerSpec":
        """Reads a `[[model.pattern]]` table: `mixer`, `norm_placement` and, beside them, the options."""
        if "mixer" not in table:
            raise ValueError(f"pattern entry lacks the key mixer: {dict(table)}")
        own = {name: table[name] for name in ("mixer", "norm_placement") if name in table}
        return cls(options=tuple((k, v) for k, v in table.items() if k not in own), **own)

    def to_dict(self) -> dict[str, Any]:
        """The inverse of `from_dict`; a placement that is the default is left out, as such options are."""
        placement = {} if self.norm_placement == "pre" else {"norm_placement": self.norm_placement}
        return {"mixer": self.mixer, **placement, **dict(self.options)}

    def meanings(self) -> dict[str, str]:
        """What the keys of such a table mean, those of the mixer included."""
        own = meanings_of(find_mixer(self.mixer)).items()
        shared = meanings_of(MixerSettings) | {name: text for name, text in own if not text.startswith("as in")}
        return shared | meanings_of(MixerSpec) | meanings_of(type(self))


@dataclass(frozen=True, kw_only=True)
class LayerOverride(MixerSpec):
    """A mixer for certain layers, in place of the pattern's.

    Attributes:
        layers: their numbers in the stack, the first is 0.

    Examples:
        >>> attention = LayerOverride(mixer="attention", options=(("num_heads", 2),), layers=(3, 7))
        >>> attention.layers
        (3, 7)
    """

    layers: tuple[int, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.layers, tuple) or not all(type(index) is int for index in self.layers):
            raise ValueError(f"layers must be a tuple of integers, got {self.layers!r}")

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> "LayerOverride":
        """Reads a `[[model.layer_overrides]]` table: `layers`, `mixer` and, beside them, the options."""
        indices = table.get("layers")
        if not isinstance(indices, list | tuple) or not all(type(index) is int for index in indices):
            raise ValueError(f"layers must be an array of integers, got {indices!r}")
        spec = MixerSpec.from_dict({key: value for key, value in table.items() if key != "layers"})
        return cls(layers=tuple(indices), **vars(spec))

    def to_dict(self) -> dict[str, Any]:
        """The inverse of `from_dict`."""
        return {"layers": list(self.layers), **super().to_dict()}


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """A mixture of experts, see `delta_jax.layers.MixtureOfExperts`.

    Attributes:
        expert_size: width of an expert.
        num_experts: experts to choose from.
        num_experts_per_token: experts that each token goes to.
        shared_expert_size: width of the expert that all tokens share; 0 is none.
        router: how scores come from logits.
        routed_scaling_factor: factor on the sum over the chosen experts.
        normalize_weights: whether the scores of the chosen experts are divided by their sum.
        num_expert_groups: groups of experts.
        num_groups_per_token: groups that a token's experts may come from.
        use_shared_expert_gate: whether every token gates the shared expert.
        balance_rate: by how much a training step moves the bias of an expert that got more or fewer tokens than the
            mean. All tokens of the batch count, padding too.

    Examples:
        >>> experts = ExpertsConfig(expert_size=8, num_experts=4, num_experts_per_token=2, shared_expert_size=8)
        >>> experts.router
        'sigmoid'
    """

    expert_size: int
    num_experts: int
    num_experts_per_token: int
    shared_expert_size: int = 0
    router: Literal["sigmoid", "softmax"] = "sigmoid"
    routed_scaling_factor: float = 1.0
    normalize_weights: bool = True
    num_expert_groups: int = 1
    num_groups_per_token: int = 1
    use_shared_expert_gate: bool = False
    balance_rate: float = 0.001

    def __post_init__(self) -> None:
        require_positive_integers(
            expert_size=self.expert_size,
            num_experts=self.num_experts,
            num_experts_per_token=self.num_experts_per_token,
            num_expert_groups=self.num_expert_groups,
            num_groups_per_token=self.num_groups_per_token,
        )
        require_counts(shared_expert_size=self.shared_expert_size)
        require_flags(use_shared_expert_gate=self.use_shared_expert_gate, normalize_weights=self.normalize_weights)
        require_positive_numbers(routed_scaling_factor=self.routed_scaling_factor)
        if self.balance_rate != 0 or isinstance(self.balance_rate, bool):
            require_positive_numbers(balance_rate=self.balance_rate)


class Layer(NamedTuple):
    """One layer of the stack: its mixer, and whether experts follow in place of the SwiGLU layer."""

    mixer: MixerSpec
    experts: bool


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A stack of blocks, each a mixer and a SwiGLU layer or a mixture of experts, between an embedding and a head.

    Attributes:
        vocab_size: number of token ids.
        hidden_size: width of the residual stream.
        num_layers: number of blocks.
        pattern: the mixers of consecutive blocks, repeated until num_layers are filled; the last repeat may be cut.
        layer_overrides: mixers of single blocks, in place of the pattern's.
        intermediate_size: width of the SwiGLU layer; None is 8/3 of hidden_size, rounded up to a multiple of 256, 0
            leaves it and its norm out.
        experts: a mixture of experts in place of the SwiGLU layer; None is none.
        dense_layers: the blocks that keep the SwiGLU layer where there are experts, by their numbers in the stack.
        tie_embeddings: use the embedding as the head.
        norm_eps: epsilon of every RMSNorm, those inside the mixers too unless they have their own.
        zero_centered_norms: the form of the norms between the layers, see `RMSNorm`.
        initializer_std: standard deviation of every matrix at the start.
        remat: what the backward pass computes again to save memory: "none"; "dots", all but the matrix
            products with weights; "block", everything but the input of every block.
        remat_save: what of that is kept after all, by name: "delta_rule_states" and "delta_rule_output", without which the
            op runs forward once more; on a TPU the states take `key * value / 64 + 2 * value + 256` bytes a token and head
            in bfloat16, 768 at 128 x 128; "mixer_output", what the mixer adds to the residual stream.
        remat_offload: likewise what is kept in the host's memory, and fetched for the backward pass.
        dtype: of the computation. Norms, decays, states and logits are float32 regardless.
        param_dtype: of the parameters.

    Examples:
        >>> mixer = MixerSpec(mixer="delta_net", options=(("num_heads", 2),))
        >>> config = ModelConfig(vocab_size=11, hidden_size=8, num_layers=2, pattern=(mixer,))
        >>> config.intermediate_size is None, config.dtype
        (True, 'bfloat16')
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    pattern: tuple[MixerSpec, ...]
    layer_overrides: tuple[LayerOverride, ...] = ()
    intermediate_size: int | None = None
    experts: ExpertsConfig | None = None
    dense_layers: tuple[int, ...] = ()
    tie_embeddings: bool = False
    norm_eps: float = 1e-6
    zero_centered_norms: bool = False
    initializer_std: float = 0.02
    remat: str = "none"
    remat_save: tuple[str, ...] = ()
    remat_offload: tuple[str, ...] = ()
    dtype: str = "bfloat16"
    param_dtype: str = "float32"

    def __post_init__(self) -> None:
        require_positive_integers(vocab_size=self.vocab_size, hidden_size=self.hidden_size, num_layers=self.num_layers)
        require_counts(intermediate_size=0 if self.intermediate_size is None else self.intermediate_size)
        require_flags(tie_embeddings=self.tie_embeddings, zero_centered_norms=self.zero_centered_norms)
        require_positive_numbers(norm_eps=self.norm_eps, initializer_std=self.initializer_std)
        self._check_kinds()
        if not self.pattern:
            raise ValueError("pattern must hold at least one mixer")
        if self.num_layers < len(self.pattern):
            raise ValueError(
                f"num_layers must be at least the length of the pattern, got {self.num_layers} and {len(self.pattern)}"
            )
        self._check_choices()
        self._check_layers()
        layers: dict[str, Callable[..., nnx.Module]] = {
            f"{field}.{index}": partial(self.mixer, spec)
            for field in ("pattern", "layer_overrides")
            for index, spec in enumerate(getattr(self, field))
        }
        if self.experts is not None:
            layers["experts"] = self.expert_layer
        for name, layer in layers.items():
            try:
                _check_parameters(jax.eval_shape(lambda layer=layer: layer(rngs=nnx.Rngs(0))))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error

    def _check_kinds(self) -> None:
        for name, kind in {"pattern": MixerSpec, "layer_overrides": LayerOverride}.items():
            specs = getattr(self, name)
            if not isinstance(specs, tuple):
                raise ValueError(f"{name} must be a tuple of {kind.__name__}, got {specs!r}")
            for spec in specs:
                if type(spec) is not kind:
                    raise ValueError(f"{name} must hold {kind.__name__}(mixer=...), got {spec!r}")
        if self.experts is not None and not isinstance(self.experts, ExpertsConfig):
            raise ValueError(f"experts must be an ExpertsConfig or None, got {self.experts!r}")

    def _check_choices(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_layers"):
            if getattr(self, name) >= 2**31:
                raise ValueError(f"{name} must be below 2^31, got {getattr(self, name)}")
        for name, allowed in {"remat": REMAT_POLICIES, "dtype": DTYPES, "param_dtype": DTYPES}.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name in ("remat_save", "remat_offload"):
            names = getattr(self, name)
            if not isinstance(names, tuple) or any(one not in RESIDUALS for one in names):
                raise ValueError(f"{name} must hold names of {', '.join(RESIDUALS)}, got {names!r}")
            if names and self.remat == "none":
                raise ValueError(f"{name} must be empty with remat = 'none', which keeps everything, got {names!r}")
        if set(self.remat_save) & set(self.remat_offload):
            raise ValueError(f"remat_offload must not name what remat_save does, got {self.remat_offload!r}")

    def _check_layers(self) -> None:
        indices = [index for spec in self.layer_overrides for index in spec.layers]
        for index in indices:
            if not 0 <= index < self.num_layers:
                raise ValueError(f"layer_overrides names layer {index}, but the layers are 0 to {self.num_layers - 1}")
            if indices.count(index) > 1:
                raise ValueError(f"layer_overrides names layer {index} twice")
        if not isinstance(self.dense_layers, tuple) or not all(type(index) is int for index in self.dense_layers):
            raise ValueError(f"dense_layers must be a tuple of integers, got {self.dense_layers!r}")
        if self.dense_layers and self.experts is None:
            raise ValueError(f"dense_layers must be empty without experts, got {self.dense_layers}")
        for index in self.dense_layers:
            if not 0 <= index < self.num_layers:
                raise ValueError(f"dense_layers names layer {index}, but the layers are 0 to {self.num_layers - 1}")
        if len(set(self.dense_layers)) < len(self.dense_layers):
            raise ValueError(f"dense_layers must name a layer once, got {self.dense_layers}")

    def mixer(self, spec: MixerSpec, rngs: nnx.Rngs) -> TokenMixer:
        """The layer that an entry of the pattern stands for."""
        layer: Callable[..., TokenMixer] = find_mixer(spec.mixer)
        return layer(
            self.hidden_size,
            norm_eps=self.norm_eps,
            initializer_std=self.initializer_std,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            rngs=rngs,
            **dict(spec.options),
        )

    def expert_layer(self, rngs: nnx.Rngs) -> MixtureOfExperts:
        """The layer that `experts` stands for."""
        assert self.experts is not None
        options = dataclasses.asdict(self.experts)
        del options["balance_rate"]
        return MixtureOfExperts(
            self.hidden_size,
            **options,
            initializer_std=self.initializer_std,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            rngs=rngs,
        )

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Every layer of the stack."""
        overrides = {
            index: MixerSpec(mixer=spec.mixer, options=spec.options, norm_placement=spec.norm_placement)
            for spec in self.layer_overrides
            for index in spec.layers
        }
        return tuple(
            Layer(
                overrides.get(index, self.pattern[index % len(self.pattern)]),
                self.experts is not None and index not in self.dense_layers,
            )
            for index in range(self.num_layers)
        )

    @property
    def runs(self) -> tuple[Run, ...]:
        """The stack, cut into runs that each repeat a block.

        A block is at most as long as the pattern, unless dense layers are strewn over the stack: then it may hold so many
        patterns that fewest layers are compiled, such as two where every other pattern has a dense layer.
        """
        period, strewn = len(self.pattern), sorted(self.dense_layers) != list(range(len(self.dense_layers)))
        most = self.num_layers // (2 * period) if strewn else 1
        cuts = [cut_into_runs(self.layers, n * period) for n in range(1, max(most, 1) + 1)]
        return min(cuts, key=lambda runs: sum(len(run.block) for run in runs))

    @property
    def parameter_rules(self) -> dict[str, ParameterRule]:
        """What the mixers say of parameters of their own, by the path in the model."""
        blocks = [layer.mixer for run in self.runs for layer in run.block]
        return {
            f"blocks/{index}/mixer/{path}": rule
            for index, spec in enumerate(blocks)
            for path, rule in find_mixer(spec.mixer).parameter_rules.items()
        }

    @property
    def mlp_width(self) -> int:
        """The width of the SwiGLU layer, with its default filled in."""
        if self.intermediate_size is not None:
            return self.intermediate_size
        return 256 * -(-(8 * self.hidden_size // 3) // 256)


def _frozen(value: Any) -> Any:
    """Arrays of TOML as tuples, so that a configuration can be hashed."""
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def _are_pairs(options: Any) -> bool:
    pairs = isinstance(options, tuple) and all(isinstance(pair, tuple) and len(pair) == 2 for pair in options)
    return pairs and all(isinstance(name, str) for name, _ in options)


def _check_parameters(layer: nnx.Module) -> None:
    """Raises a ValueError if a layer has a state besides parameters, or its rules do not fit them."""
    others = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.state(layer, nnx.Not(nnx.Param))))
    if others:
        raise ValueError(f"{path_string(others[0][0])} is no nnx.Param: a layer may hold nothing else that changes")
    shapes = {
        path_string(path): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.state(layer, nnx.Param)))
    }
    rules = getattr(layer, "parameter_rules", {})
    if not isinstance(rules, Mapping):
        raise ValueError(f"parameter_rules must be a dictionary from paths to a ParameterRule, got {rules!r}")
    for path, rule in rules.items():
        if not isinstance(rule, ParameterRule) or not isinstance(rule.axes, tuple) or not isinstance(rule.decays, bool):
            raise ValueError(f"parameter_rules[{path!r}] must be a ParameterRule(axes, decays), got {rule!r}")
        if path not in shapes:
            raise ValueError(f"parameter_rules names {path!r}, but the parameters are {', '.join(shapes)}")
        if len(rule.axes) != len(shapes[path]) or not set(rule.axes) <= {None, *AXES}:
            raise ValueError(
                f"parameter_rules[{path!r}] must name an axis of the mesh ({', '.join(AXES)}) or None for each of the "
                f"{len(shapes[path])} axes of the parameter, got {rule.axes!r}"
            )
