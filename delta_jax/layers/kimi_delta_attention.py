"""Kimi Delta Attention: the delta rule with a decay per channel."""

import math
from typing import Unpack

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from delta_jax.layers.checks import require_flags
from delta_jax.layers.gates import bounded_log_decay, initial_log_rate, initial_step_bias, log_decay
from delta_jax.layers.low_rank import LowRank
from delta_jax.layers.mixer import Mixer, MixerOptions, MixerSettings, RuleInputs

__all__ = ["KimiDeltaAttention"]


class KimiDeltaAttention(Mixer):
    """The delta rule on a state each channel of which decays by itself, before the erase.

        S_t = (I - beta_t k_t k_t^T) Diag(exp g_t) S_{t-1} + beta_t k_t v_t^T
        f_t = x_t W_down W_up + dt_bias        or        x_t W_f + dt_bias
        g_t = -exp(A_log) * softplus(f_t)      or, bounded,      g_t = bound * sigmoid(exp(A_log) * f_t)

    Decay and output gate are of low rank, that of a value head, unless asked otherwise; the output gate is a sigmoid.

    Args:
        hidden_size: width of x.
        num_heads, head_dim, expand_v, use_output_gate, allow_negative_eigenvalues: as in `MixerSettings`.
        gate_lower_bound: the bound of the bounded gate, a negative number, -5 in released code; None is the softplus gate.
        use_output_gate_bias: adds a bias to the output gate of low rank; Kimi Linear has none, other code has one.
        use_low_rank_gates: without it decay and output gate come from x by one matrix each, without a bias, as in Ling 3.0.
        rngs: where the initial parameters come from.
        options: the other options, see `MixerSettings`; the output gate is a sigmoid unless another is asked for.

    Raises:
        ValueError: an option is impossible, alone or with the others.

    Source: Kimi Team, "Kimi Linear: an expressive, efficient attention architecture", 2025 (arXiv 2510.26692)
    equations 1 and 10; read its chunkwise gamma^{i->r} as gamma_r / gamma_i, the product as printed starts one too early.

    Examples:
        >>> layer = KimiDeltaAttention(16, num_heads=2, head_dim=8, gate_lower_bound=-5.0, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 5, 16))).shape
        (2, 5, 16)
    """

    unit_qk = True
    weighs_streams = False

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int = 16,
        head_dim: int | None = 128,
        expand_v: float = 1.0,
        use_output_gate: bool = True,
        allow_negative_eigenvalues: bool = False,
        use_output_gate_bias: bool = True,
        use_low_rank_gates: bool = True,
        gate_lower_bound: float | None = None,
        rngs: nnx.Rngs,
        **options: Unpack[MixerOptions],
    ):
        require_flags(use_output_gate_bias=use_output_gate_bias, use_low_rank_gates=use_low_rank_gates)
        options.setdefault("output_gate_activation", "sigmoid")
        settings = MixerSettings(
            hidden_size=hidden_size,
            num_heads=num_heads,
            head_dim=head_dim,
            expand_v=expand_v,
            use_output_gate=use_output_gate,
            allow_negative_eigenvalues=allow_negative_eigenvalues,
            output_gate_low_rank=use_low_rank_gates,
            output_gate_bias=use_output_gate_bias,
            **options,
        )
        number = isinstance(gate_lower_bound, int | float)
        if gate_lower_bound is not None and not (number and -math.inf < gate_lower_bound < 0):
            raise ValueError(f"gate_lower_bound must be a negative number or None, got {gate_lower_bound!r}")
        super().__init__(settings, rngs=rngs)
        self.gate_lower_bound = gate_lower_bound
        gates = self.num_v_heads * self.key_dim
        if use_low_rank_gates:
            self.f_proj: nnx.Module = LowRank(self, hidden_size, self.value_dim, gates, rngs, use_bias=False)
        else:
            self.f_proj = self.linear(hidden_size, gates, rngs)
        self.b_proj = self.linear(hidden_size, self.num_v_heads, rngs)
        bounded = gate_lower_bound is not None
        log_rate = (
            jnp.zeros((self.num_v_heads,)) if bounded else initial_log_rate(rngs.params(), self.num_v_heads, low=1.0)
        )
        self.A_log = nnx.Param(log_rate)
        self.dt_bias = nnx.Param(initial_step_bias(rngs.params(), gates))

    def rule_inputs(
        self,
        x: Float[Array, "batch time hidden"],
        q: Float[Array, "batch time heads key"],
        k: Float[Array, "batch time heads key"],
        v: Float[Array, "batch time v_heads value"],
    ) -> RuleInputs:
        f = self.f_proj(x).reshape(*x.shape[:2], self.num_v_heads, self.key_dim)
        if self.gate_lower_bound is None:
            g = log_decay(f, self.A_log[...], self.dt_bias[...])
        else:
            g = bounded_log_decay(f, self.A_log[...], self.dt_bias[...], self.gate_lower_bound)
        return RuleInputs(q, k, v, beta=self.write_strength(self.b_proj(x)), g=g)
