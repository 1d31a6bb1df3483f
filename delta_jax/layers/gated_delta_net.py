"""Gated DeltaNet: the delta rule with a decay per head."""

from typing import ClassVar, Unpack

from flax import nnx
from jaxtyping import Array, Float

from delta_jax.layers.gates import initial_log_rate, initial_step_bias, log_decay
from delta_jax.layers.mixer import Mixer, MixerOptions, MixerSettings, RuleInputs

__all__ = ["GatedDeltaNet"]


class GatedDeltaNet(Mixer):
    """The delta rule on a state that first decays by `exp(g_t)`, one number per value head.

        S_t = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T
        g_t = -exp(A_log) * softplus(x_t W_a + dt_bias)             beta_t = sigmoid(x_t W_b)

    Args:
        hidden_size: width of x.
        num_heads, head_dim, expand_v, use_output_gate, allow_negative_eigenvalues: as in `MixerSettings`.
        rngs: where the initial parameters come from.
        options: the other options, see `MixerSettings`.

    Source: Yang, Kautz and Hatamizadeh, "Gated delta networks: improving Mamba2 with delta rule", 2024
    (arXiv 2412.06464); the decay after Dao and Gu, "Transformers are SSMs", 2024.

    Examples:
        >>> layer = GatedDeltaNet(16, num_heads=2, head_dim=8, expand_v=2.0, rngs=nnx.Rngs(0))
        >>> x = jnp.ones((2, 5, 16))
        >>> layer(x).shape
        (2, 5, 16)
        >>> layer.init_cache(batch_size=2).state.shape  # values are twice as wide as keys
        (2, 2, 8, 16)
    """

    unit_qk = True
    weighs_streams = False
    beta_bias: ClassVar[bool] = False

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int = 6,
        head_dim: int | None = 256,
        expand_v: float = 2.0,
        use_output_gate: bool = True,
        allow_negative_eigenvalues: bool = False,
        rngs: nnx.Rngs,
        **options: Unpack[MixerOptions],
    ):
        settings = MixerSettings(
            hidden_size=hidden_size,
            num_heads=num_heads,
            head_dim=head_dim,
            expand_v=expand_v,
            use_output_gate=use_output_gate,
            allow_negative_eigenvalues=allow_negative_eigenvalues,
            **options,
        )
        super().__init__(settings, rngs=rngs)
        self.a_proj = self.linear(hidden_size, self.num_v_heads, rngs)
        self.b_proj = self.linear(hidden_size, self.num_v_heads, rngs, use_bias=self.beta_bias)
        self.A_log = nnx.Param(initial_log_rate(rngs.params(), self.num_v_heads))
        self.dt_bias = nnx.Param(initial_step_bias(rngs.params(), self.num_v_heads))

    def rule_inputs(
        self,
        x: Float[Array, "batch time hidden"],
        q: Float[Array, "batch time heads key"],
        k: Float[Array, "batch time heads key"],
        v: Float[Array, "batch time v_heads value"],
    ) -> RuleInputs:
        beta = self.write_strength(self.b_proj(x))
        g = log_decay(self.a_proj(x), self.A_log[...], self.dt_bias[...])
        return RuleInputs(q, k, v, beta=beta, g=g)
