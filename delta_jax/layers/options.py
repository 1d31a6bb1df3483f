"""What a mixer on the delta rule is told: its options, their defaults, and which are impossible."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypedDict

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array

from delta_jax.layers.checks import (
    require_dtypes,
    require_flags,
    require_positive_integers,
    require_positive_integers_or_none,
    require_positive_numbers,
)
from delta_jax.ops.arguments import require_chunk_size
from delta_jax.ops.short_convolution import ACTIVATIONS

__all__ = ["MixerOptions", "MixerSettings"]

GATE_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"silu": jax.nn.silu, "sigmoid": jax.nn.sigmoid}


class MixerOptions(TypedDict, total=False):
    """The keyword arguments whose defaults every member shares; see `MixerSettings`."""

    num_v_heads: int | None
    conv_size: int
    use_short_conv: bool
    conv_bias: bool
    output_gate_activation: str
    norm_eps: float
    output_norm_eps: float | None
    initializer_std: float
    chunk_size: int | None
    implementation: str | None
    dtype: DTypeLike
    param_dtype: DTypeLike


@dataclass(frozen=True, kw_only=True)
class MixerSettings:
    """All options of a `Mixer`; each member takes those that make sense for it as keyword arguments.

    Attributes:
        hidden_size: width of x.
        num_heads: heads of q and k.
        head_dim: key size per head; None is hidden_size / num_heads.
        expand_v: value size per head, as a multiple of head_dim.
        use_output_gate: multiplies the normalised output with a gate, silu(x W_g).
        allow_negative_eigenvalues: beta in [0, 2] in place of [0, 1].
        num_householder: writes a token, each with a key, value and step size of its own; None is one.
        output_gate_activation: "silu" or "sigmoid".
        output_gate_low_rank: makes W_g a product of two matrices, of the rank of a value head.
        output_gate_bias: adds a bias after them.
        use_output_norm: normalises the output.
        qk_activation: follows the convolution of q and k, or their projection: "silu", "relu", "elu", which is elu + 1, or
            "identity".
        conv_bias: adds a bias to the short convolutions.
        num_v_heads: heads of v and of the state, a multiple of num_heads; None is num_heads.
        conv_size: width of the short convolutions, in tokens.
        use_short_conv: without it the activation follows the projections directly.
        norm_eps: epsilon of the output norm, unless it has its own.
        output_norm_eps: its own; None is norm_eps.
        initializer_std: standard deviation of every weight matrix and convolution at the start.
        chunk_size, implementation: handed to the op.
        dtype: of the computation; norms, decays and the state are float32 regardless.
        param_dtype: of the parameters.

    Raises:
        ValueError: an option is impossible, alone or with the others.
    """

    hidden_size: int
    num_heads: int
    head_dim: int | None
    expand_v: float
    use_output_gate: bool
    allow_negative_eigenvalues: bool = False
    num_householder: int | None = None
    output_gate_activation: str = "silu"
    output_gate_low_rank: bool = False
    output_gate_bias: bool = True
    use_output_norm: bool = True
    qk_activation: str = "silu"
    conv_bias: bool = False
    num_v_heads: int | None = None
    conv_size: int = 4
    use_short_conv: bool = True
    norm_eps: float = 1e-5
    output_norm_eps: float | None = None
    initializer_std: float = 0.02
    chunk_size: int | None = None
    implementation: str | None = None
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def __post_init__(self) -> None:
        require_positive_integers(hidden_size=self.hidden_size, num_heads=self.num_heads, conv_size=self.conv_size)
        require_positive_integers_or_none(
            head_dim=self.head_dim, num_v_heads=self.num_v_heads, num_householder=self.num_householder
        )
        require_chunk_size(self.chunk_size)
        require_dtypes(dtype=self.dtype, param_dtype=self.param_dtype)
        flags = (
            "use_output_gate",
            "allow_negative_eigenvalues",
            "use_short_conv",
            "output_gate_low_rank",
            "output_gate_bias",
            "use_output_norm",
            "conv_bias",
        )
        require_flags(**{name: getattr(self, name) for name in flags})
        require_positive_numbers(expand_v=self.expand_v, norm_eps=self.norm_eps, initializer_std=self.initializer_std)
        if self.output_norm_eps is not None:
            require_positive_numbers(output_norm_eps=self.output_norm_eps)
            if not self.use_output_norm:
                raise ValueError(f"output_norm_eps must be None without use_output_norm, got {self.output_norm_eps}")
        if self.conv_bias and not self.use_short_conv:
            raise ValueError("conv_bias must be false without use_short_conv, got True")
        for name, known in {"output_gate_activation": GATE_ACTIVATIONS, "qk_activation": ACTIVATIONS}.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise ValueError(f"num_heads must divide hidden_size unless head_dim is given, got {self.num_heads}")
        if self.v_heads % self.num_heads:
            raise ValueError(f"num_v_heads must be a multiple of num_heads, got {self.v_heads} and {self.num_heads}")
        wanted = self.key_dim * self.expand_v
        if self.value_dim < 1 or abs(self.value_dim - wanted) > 1e-6:
            raise ValueError(
                f"expand_v must make head_dim * expand_v a positive integer, got {self.expand_v} * {self.key_dim}"
            )

    @property
    def key_dim(self) -> int:
        """Key size per head."""
        return self.hidden_size // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def value_dim(self) -> int:
        """Value size per head."""
        return round(self.key_dim * self.expand_v)

    @property
    def v_heads(self) -> int:
        """Heads of v and of the state."""
        return self.num_heads if self.num_v_heads is None else self.num_v_heads

    @property
    def eps(self) -> float:
        """Epsilon of the output norm."""
        return self.norm_eps if self.output_norm_eps is None else self.output_norm_eps

    @property
    def stream_sizes(self) -> tuple[int, int, int]:
        """Channels of q, of the keys and of the values of a token, over all heads and writes."""
        writes = self.num_householder or 1
        return (
            self.num_heads * self.key_dim,
            writes * self.num_heads * self.key_dim,
            writes * self.v_heads * self.value_dim,
        )
