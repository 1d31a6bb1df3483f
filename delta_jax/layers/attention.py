"""Softmax attention: grouped heads, rotary embedding, a sliding window, normalised queries and keys, an output gate."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from delta_jax.layers.cached_attention import CachedAttention
from delta_jax.layers.checks import (
    require_dtypes,
    require_flags,
    require_positive_integers,
    require_positive_integers_or_none,
    require_positive_numbers,
    require_rngs,
)
from delta_jax.layers.contained import contained
from delta_jax.layers.norm import RMSNorm
from delta_jax.layers.rope_scaling import RopeScaling
from delta_jax.ops.attention import attend, require_attention, rotate
from delta_jax.ops.segments import Positions

__all__ = ["Attention"]


class Attention(CachedAttention):
    """Causal softmax attention, over all of a segment or over a sliding window.

        q, k = rope(norm(x W_q)), rope(norm(x W_k))     v = x W_v     o_t = sum_s softmax_s(q_t k_s / sqrt(head_dim)) v_s
        y    = (o * sigmoid(x W_g)) W_o                 norm and gate only when asked for

    Args:
        hidden_size: width of x.
        num_heads: heads of q.
        num_kv_heads: heads of k and v, a divisor of num_heads; None is num_heads.
        head_dim: size of a head; None is hidden_size / num_heads.
        window: how many tokens a token sees, itself included; None is all of its segment.
        rope_theta: the base of the rotary embedding's wave lengths.
        rope_fraction: the share of a head's channels that is rotated, from the first on; 0 is no positions.
        rope_scaling: how these wave lengths are stretched for long sequences, see `RopeScaling`; None is not at all.
        use_qk_norm: RMSNorm of q and k, before the rotation.
        qk_norm_width: over what it is taken: "head", each head by itself, or "all", all heads of q, or of k, at once.
        zero_centered_norms: the form of these norms, see `RMSNorm`.
        use_output_gate: multiplies the output with sigmoid(x W_g). (Qwen3-Next's checkpoints keep W_g inside W_q, each
            head's query first.)
        use_qkv_bias: adds biases after W_q, W_k and W_v.
        use_output_bias: adds one after W_o.
        norm_eps: epsilon of the norms.
        initializer_std: standard deviation of every weight matrix at the start.
        implementation: as in `delta_jax.ops.attention.attend`: None or "xla", or "cudnn" on NVIDIA GPUs.
        dtype: of the computation; softmax, norms and rotation are float32 regardless.
        param_dtype: of the parameters.
        rngs: where the initial parameters come from.

    Raises:
        ValueError: an option is impossible, alone or with the others.

    Source: Vaswani et al., 2017; grouped heads: Ainslie et al., "GQA", 2023; the window: Beltagy et al., "Longformer",
    2020; the gate after Qiu et al., "Gated attention for large language models", 2025, as in Qwen3-Next; the norm of all
    heads at once as in OLMo 2 (OLMo team, 2025).

    Examples:
        >>> layer = Attention(16, num_heads=2, num_kv_heads=1, window=3, rngs=nnx.Rngs(0))
        >>> x = jnp.ones((2, 5, 16))
        >>> layer(x).shape
        (2, 5, 16)
        >>> layer.init_cache(batch_size=2).entries[0].shape  # as many tokens as the window holds
        (2, 3, 1, 8)
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int = 8,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        window: int | None = None,
        rope_theta: float = 10000.0,
        rope_fraction: float = 1.0,
        rope_scaling: RopeScaling | None = None,
        use_qk_norm: bool = False,
        qk_norm_width: Literal["head", "all"] = "head",
        zero_centered_norms: bool = False,
        use_output_gate: bool = False,
        use_qkv_bias: bool = False,
        use_output_bias: bool = False,
        norm_eps: float = 1e-5,
        initializer_std: float = 0.02,
        implementation: str | None = None,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        require_positive_integers(hidden_size=hidden_size, num_heads=num_heads)
        require_positive_integers_or_none(num_kv_heads=num_kv_heads, head_dim=head_dim, window=window)
        require_dtypes(dtype=dtype, param_dtype=param_dtype)
        require_rngs(rngs)
        require_positive_numbers(rope_theta=rope_theta, norm_eps=norm_eps, initializer_std=initializer_std)
        require_flags(
            use_qk_norm=use_qk_norm,
            zero_centered_norms=zero_centered_norms,
            use_output_gate=use_output_gate,
            use_qkv_bias=use_qkv_bias,
            use_output_bias=use_output_bias,
        )
        if qk_norm_width not in ("head", "all"):
            raise ValueError(f"qk_norm_width must be one of head, all, got {qk_norm_width!r}")
        if qk_norm_width == "all" and not use_qk_norm:
            raise ValueError("qk_norm_width 'all' needs use_qk_norm")
        if rope_scaling is not None and not isinstance(rope_scaling, RopeScaling):
            raise ValueError(f"rope_scaling must be a RopeScaling or None, got {rope_scaling!r}")
        if head_dim is None and hidden_size % num_heads:
            raise ValueError(f"num_heads must divide hidden_size unless head_dim is given, got {num_heads}")
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads % num_kv_heads:
            raise ValueError(f"num_kv_heads must divide num_heads, got {num_kv_heads} and {num_heads}")
        require_attention(implementation)
        self.hidden_size = hidden_size
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = hidden_size // num_heads if head_dim is None else head_dim
        self.window = window
        self.rope_theta = rope_theta
        self.rope_channels = _rotated(self.head_dim, rope_fraction)
        if rope_scaling is not None:
            rope_scaling.factors(theta=rope_theta, channels=self.rope_channels)  # which are made where they are needed
        self.rope_scaling = rope_scaling
        self.use_qk_norm = use_qk_norm
        self.qk_norm_width = qk_norm_width
        self.use_output_gate = use_output_gate
        self.initializer_std = initializer_std
        self.implementation = implementation
        self.dtype = jnp.dtype(dtype)
        self.param_dtype = jnp.dtype(param_dtype)

        size, kv_size = num_heads * self.head_dim, num_kv_heads * self.head_dim
        self.q_proj, self.k_proj, self.v_proj = (
            self.linear(hidden_size, n, rngs, use_bias=use_qkv_bias) for n in (size, kv_size, kv_size)
        )
        if use_qk_norm:
            kind: dict[str, Any] = {"eps": norm_eps, "zero_centered": zero_centered_norms, "param_dtype": param_dtype}
            sizes = (size, kv_size) if qk_norm_width == "all" else (self.head_dim,) * 2
            self.q_norm, self.k_norm = (RMSNorm(n, **kind) for n in sizes)
        if use_output_gate:
            self.g_proj = self.linear(hidden_size, size, rngs)
        self.o_proj = self.linear(size, hidden_size, rngs, use_bias=use_output_bias)

    @property
    def token_shapes(self) -> tuple[tuple[int, ...], ...]:
        return ((self.num_kv_heads, self.head_dim),) * 2

    def project(
        self, x: Float[Array, "batch time hidden"], position: Int[Array, "batch time"]
    ) -> tuple[Float[Array, "batch time heads channels"], tuple[Array, ...]]:
        q, k, v = (f(x) for f in (self.q_proj, self.k_proj, self.v_proj))
        if self.qk_norm_width == "all":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (y.reshape(*x.shape[:2], -1, self.head_dim) for y in (q, k, v))
        if self.use_qk_norm and self.qk_norm_width == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        options: dict[str, Any] = {"theta": self.rope_theta, "channels": self.rope_channels}
        if self.rope_scaling is not None:
            factors = jnp.asarray(self.rope_scaling.factors(**options))
            options |= {"factors": factors, "amplitude": self.rope_scaling.amplitude}
        return rotate(q, position, **options), (rotate(k, position, **options), v)

    def _mix(
        self,
        x: Float[Array, "batch time hidden"],
        q: Float[Array, "batch time heads channels"],
        entries: tuple[Array, ...],
        positions: tuple[Positions, Positions] | None,
    ) -> Float[Array, "batch time hidden"]:
        k, v = entries
        options: dict[str, Any] = {"scale": self.head_dim**-0.5, "window": self.window}
        o = attend(q, k, v, **options, positions=positions, implementation=self.implementation)

        def output(x: Array, o: Array) -> Array:
            return self.o_proj(o * jax.nn.sigmoid(self.g_proj(x)) if self.use_output_gate else o)

        return contained(output, x, o.reshape(*x.shape[:2], -1))


def _rotated(head_dim: int, fraction: float) -> int:
    """The number of channels that are rotated."""
    if not isinstance(fraction, int | float) or isinstance(fraction, bool) or not 0 <= fraction <= 1:
        raise ValueError(f"rope_fraction must lie in [0, 1], got {fraction!r}")
    channels = round(head_dim * fraction)
    if abs(channels - head_dim * fraction) > 1e-6 or channels % 2:
        raise ValueError(f"rope_fraction must make an even number of head_dim's channels, got {fraction} of {head_dim}")
    return channels
