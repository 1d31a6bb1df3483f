"""What a language model is made of, as frozen data."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import jax
from flax import nnx

from delta_jax.layers import MIXERS, Mixer
from delta_jax.layers.mixer import MixerOptions

__all__ = ["MixerSpec", "ModelConfig"]

DTYPES = ("float32", "bfloat16", "float16")
REMAT_POLICIES = ("none", "dots", "block")
_NOT_OPTIONS = {
    "self",
    "hidden_size",
    "norm_eps",
    "initializer_std",
    "dtype",
    "param_dtype",
    "rngs",
    "options",
}


@dataclass(frozen=True, kw_only=True)
class MixerSpec:
    """One mixer of the repeating pattern.

    Attributes:
        mixer: a key of `delta_jax.layers.MIXERS`.
        options: keyword arguments of that layer as (name, value) pairs; some the model itself sets.
    """

    mixer: str
    options: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        if self.mixer not in MIXERS:
            raise ValueError(f"mixer must be one of {', '.join(sorted(MIXERS))}, got {self.mixer!r}")
        known = mixer_options(self.mixer)
        for name, _ in self.options:
            if name not in known:
                raise ValueError(f"mixer {self.mixer!r} has no option {name!r}, only {', '.join(known)}")
        names = [name for name, _ in self.options]
        if len(set(names)) < len(names):
            raise ValueError(f"options of mixer {self.mixer!r} name a key twice: {', '.join(names)}")

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> Self:
        """Reads a `[[model.pattern]]` table: `mixer` and, beside it, the options."""
        if "mixer" not in table:
            raise ValueError(f"pattern entry lacks the key mixer: {dict(table)}")
        return cls(mixer=table["mixer"], options=tuple((k, v) for k, v in table.items() if k != "mixer"))

    def to_dict(self) -> dict[str, Any]:
        """The inverse of `from_dict`."""
        return {"mixer": self.mixer, **dict(self.options)}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A stack of blocks, each a mixer and a SwiGLU layer, between an embedding and a head.

    Attributes:
        vocab_size: number of token ids.
        hidden_size: width of the residual stream.
        num_layers: number of blocks, a multiple of the length of the pattern.
        pattern: the mixers of consecutive blocks, repeated until num_layers are filled.
        mlp_size: width of the SwiGLU layer; None is 8/3 of hidden_size, rounded up to a multiple of 256.
        tie_embeddings: use the embedding as the head.
        norm_eps: epsilon of every RMSNorm, those inside the mixers too.
        initializer_std: standard deviation of every matrix at the start.
        remat: what the backward pass computes again to save memory: "none"; "dots", all but the matrix
            products with weights; "block", everything but the input of every block.
        dtype: of the computation. Norms, decays, states and logits are float32 regardless.
        param_dtype: of the parameters.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    pattern: tuple[MixerSpec, ...]
    mlp_size: int | None = None
    tie_embeddings: bool = False
    norm_eps: float = 1e-6
    initializer_std: float = 0.02
    remat: str = "none"
    dtype: str = "bfloat16"
    param_dtype: str = "float32"

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_layers", "mlp_size"):
            number = getattr(self, name)
            if name == "mlp_size" and number is None:
                continue
            if not isinstance(number, int) or isinstance(number, bool) or number < 1:
                raise ValueError(f"{name} must be a positive integer, got {number!r}")
        for name in ("norm_eps", "initializer_std"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not self.pattern:
            raise ValueError("pattern must hold at least one mixer")
        if self.num_layers % len(self.pattern):
            raise ValueError(
                f"num_layers must be a multiple of the length of the pattern, "
                f"got {self.num_layers} and {len(self.pattern)}"
            )
        self._check_choices()
        for place, spec in enumerate(self.pattern):
            try:
                jax.eval_shape(lambda spec=spec: self.mixer(spec, nnx.Rngs(0)))
            except ValueError as error:
                raise ValueError(f"pattern.{place}: {error}") from error

    def _check_choices(self) -> None:
        for name, allowed in {"remat": REMAT_POLICIES, "dtype": DTYPES, "param_dtype": DTYPES}.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")

    def mixer(self, spec: MixerSpec, rngs: nnx.Rngs) -> Mixer:
        """The layer that an entry of the pattern stands for."""
        return MIXERS[spec.mixer](
            self.hidden_size,
            norm_eps=self.norm_eps,
            initializer_std=self.initializer_std,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            rngs=rngs,
            **dict(spec.options),
        )

    @property
    def repeats(self) -> int:
        """How often the pattern is repeated."""
        return self.num_layers // len(self.pattern)

    @property
    def mlp_width(self) -> int:
        """The width of the SwiGLU layer, with its default filled in."""
        return self.mlp_size or 256 * -(-(8 * self.hidden_size // 3) // 256)


def mixer_options(mixer: str) -> tuple[str, ...]:
    """The keyword arguments of a mixer that a `MixerSpec` may set."""
    own = inspect.signature(MIXERS[mixer].__init__).parameters
    shared = MixerOptions.__annotations__
    return tuple(name for name in (*own, *shared) if name not in _NOT_OPTIONS)
