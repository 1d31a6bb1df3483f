"""Linear attention and RetNet: what a state does that never erases."""

from typing import Unpack

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from delta_jax.layers.mixer import Mixer, MixerOptions, MixerSettings, Rule, RuleInputs
from delta_jax.ops import linear_attention, linear_attention_step

__all__ = ["LinearAttention", "RetNet"]

FEATURE_MAPS = ("elu", "l2")


class LinearAttention(Mixer):
    """Attention with a kernel in place of the softmax: every token adds to the state, and nothing is forgotten.

        S_t = S_{t-1} + phi(k_t) v_t^T          o_t = rmsnorm(S_t^T phi(q_t))          phi = elu + 1

    The norm of the output stands in for the sum of weights, which later work drops.

    Args:
        hidden_size: width of x.
        num_heads, head_dim, expand_v, use_output_gate: as in `MixerSettings`.
        feature_map: phi: "elu", or "l2" for silu and the unit length of `DeltaNet`, whose layer this then is without
            the erasing.
        use_short_conv: as in `MixerSettings`, but without unless asked for; then there is no activation besides phi.
        rngs: where the initial parameters come from.
        options: the other options, see `MixerSettings`.

    Source: Katharopoulos, Vyas, Pappas and Fleuret, "Transformers are RNNs", 2020 (arXiv 2006.16236) section 3.

    Examples:
        >>> layer = LinearAttention(16, num_heads=2, feature_map="l2", rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 5, 16))).shape
        (2, 5, 16)
    """

    rule = Rule(linear_attention, linear_attention_step)
    weighs_streams = False

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int = 4,
        head_dim: int | None = None,
        expand_v: float = 1.0,
        use_output_gate: bool = False,
        feature_map: str = "elu",
        rngs: nnx.Rngs,
        **options: Unpack[MixerOptions],
    ):
        if feature_map not in FEATURE_MAPS:
            raise ValueError(f"feature_map must be one of {', '.join(FEATURE_MAPS)}, got {feature_map!r}")
        options.setdefault("use_short_conv", False)
        settings = MixerSettings(
            hidden_size=hidden_size,
            num_heads=num_heads,
            head_dim=head_dim,
            expand_v=expand_v,
            use_output_gate=use_output_gate,
            **options,
        )
        super().__init__(settings, rngs=rngs)
        self.unit_qk = feature_map == "l2"

    def activation(self, stream: Float[Array, "batch time channels"]) -> Float[Array, "batch time channels"]:
        return jax.nn.silu(stream) if self.unit_qk else stream

    def rule_inputs(
        self,
        x: Float[Array, "batch time hidden"],
        q: Float[Array, "batch time heads key"],
        k: Float[Array, "batch time heads key"],
        v: Float[Array, "batch time v_heads value"],
    ) -> RuleInputs:
        if self.unit_qk:
            return RuleInputs(q, k, v)
        return RuleInputs(jax.nn.elu(q) + 1, jax.nn.elu(k) + 1, v)


class RetNet(LinearAttention):
    """Retention: a fixed decay for every head, and keys and queries rotated by their position.

        S_t = (1 - 2^(-5 - h)) S_{t-1} + rotate(k_t, t) v_t^T        o_t = rmsnorm(S_t^T rotate(q_t, t)) * silu(x_t W_g)

    Args:
        hidden_size: width of x.
        num_heads, head_dim, expand_v, use_output_gate: as in `MixerSettings`.
        rngs: where the initial parameters come from.
        options: the other options, see `MixerSettings`; no short convolution unless asked for.

    Source: Sun et al., "Retentive network", 2023 (arXiv 2307.08621) section 2.1.

    Examples:
        >>> layer = RetNet(16, num_heads=2, head_dim=8, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 5, 16))).shape
        (2, 5, 16)
    """

    rope_theta = 10000.0
    weighs_streams = False

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int = 8,
        head_dim: int | None = None,
        expand_v: float = 2.0,
        use_output_gate: bool = True,
        rngs: nnx.Rngs,
        **options: Unpack[MixerOptions],
    ):
        super().__init__(
            hidden_size,
            num_heads=num_heads,
            head_dim=head_dim,
            expand_v=expand_v,
            use_output_gate=use_output_gate,
            rngs=rngs,
            **options,
        )
        if self.key_dim % 2:
            raise ValueError(f"head_dim must be even, since pairs of channels are rotated, got {self.key_dim}")

    def rule_inputs(
        self,
        x: Float[Array, "batch time hidden"],
        q: Float[Array, "batch time heads key"],
        k: Float[Array, "batch time heads key"],
        v: Float[Array, "batch time v_heads value"],
    ) -> RuleInputs:
        decay = np.log1p(-(2.0 ** (-5.0 - np.arange(self.num_v_heads))))
        return RuleInputs(q, k, v, g=jnp.broadcast_to(jnp.asarray(decay, jnp.float32)[None, None], v.shape[:-1]))
