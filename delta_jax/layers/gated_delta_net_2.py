"""Gated DeltaNet-2: what is erased and what is written, chosen channel by channel."""

from typing import Unpack

import jax
from flax import nnx
from jaxtyping import Array, Float

from delta_jax.layers.gates import initial_log_rate, initial_step_bias, log_decay
from delta_jax.layers.low_rank import LowRank
from delta_jax.layers.mixer import Mixer, MixerOptions, MixerSettings, RuleInputs
from delta_jax.ops.recurrence import repeat_heads

__all__ = ["GatedDeltaNet2"]


class GatedDeltaNet2(Mixer):
    """The delta rule with an erase gate per key channel, a write gate per value channel and a decay per key channel.

        S_t = (I - k_t (b_t * k_t)^T) Diag(exp g_t) S_{t-1} + k_t (w_t * v_t)^T
        b_t = sigmoid(x_t W_b)         w_t = sigmoid(x_t W_w)
        g_t = -exp(A_log) * softplus(x_t W_down W_up + dt_bias)

    With equal gates it is Kimi Delta Attention. Negative eigenvalues double b, not w: where the released code ties both to
    one beta in [0, 2] it is not DeltaNet's, which doubles both. Unlike the delta rule's, this transition is no
    contraction: its norm may exceed one even where its eigenvalues do not.

    Args:
        hidden_size: width of x.
        num_heads, head_dim, expand_v, use_output_gate, allow_negative_eigenvalues: as in `MixerSettings`.
        rngs: where the initial parameters come from.
        options: the other options, see `MixerSettings`; the paper's output gate is SiLU, other code has sigmoid.

    Source: Hatamizadeh, Choi and Kautz, "Gated DeltaNet-2", 2026 (arXiv 2605.22791).

    Examples:
        >>> layer = GatedDeltaNet2(16, num_heads=2, head_dim=8, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 5, 16))).shape
        (2, 5, 16)
    """

    unit_qk = True

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int = 16,
        head_dim: int | None = 128,
        expand_v: float = 1.0,
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
            output_gate_low_rank=True,
            **options,
        )
        super().__init__(settings, rngs=rngs)
        gates = self.num_heads * self.key_dim
        self.f_proj = LowRank(self, hidden_size, self.value_dim, gates, rngs, use_bias=False)
        self.b_proj = self.linear(hidden_size, gates, rngs)
        self.w_proj = self.linear(hidden_size, self.num_v_heads * self.value_dim, rngs)
        self.A_log = nnx.Param(initial_log_rate(rngs.params(), self.num_heads, low=1.0))
        self.dt_bias = nnx.Param(initial_step_bias(rngs.params(), gates))

    def rule_inputs(
        self,
        x: Float[Array, "batch time hidden"],
        q: Float[Array, "batch time heads key"],
        k: Float[Array, "batch time heads key"],
        v: Float[Array, "batch time v_heads value"],
    ) -> RuleInputs:
        g = log_decay(self.f_proj(x).reshape(k.shape), self.A_log[...], self.dt_bias[...])
        erase = self.write_strength(self.b_proj(x)).reshape(k.shape).astype(k.dtype) * k
        v = jax.nn.sigmoid(self.w_proj(x)).reshape(v.shape).astype(v.dtype) * v
        return RuleInputs(q, k, v, g=repeat_heads(g, self.num_v_heads), erase=erase)
