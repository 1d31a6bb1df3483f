"""Gated DeltaNet: the delta rule with a decay per head."""

import math
from typing import Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from delta_jax.layers.mixer import Mixer, MixerOptions, RuleInputs

__all__ = ["GatedDeltaNet"]


class GatedDeltaNet(Mixer):
    """The delta rule on a state that first decays by `exp(g_t)`, one number per value head.

        S_t = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T
        g_t = -exp(A_log) * softplus(x_t W_a + dt_bias)             beta_t = sigmoid(x_t W_b)

    Args:
        hidden_size: width of x.
        num_heads, head_dim, expand_v, use_output_gate, allow_negative_eigenvalues: as in `Mixer`.
        rngs: where the initial parameters come from.
        options: the other options of `Mixer`.

    Source: Yang, Kautz and Hatamizadeh, "Gated delta networks: improving Mamba2 with delta rule", 2024
    (arXiv 2412.06464); the decay after Dao and Gu, "Transformers are SSMs", 2024.
    """

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
        super().__init__(
            hidden_size,
            num_heads=num_heads,
            head_dim=head_dim,
            expand_v=expand_v,
            use_output_gate=use_output_gate,
            allow_negative_eigenvalues=allow_negative_eigenvalues,
            rngs=rngs,
            **options,
        )
        self.a_proj = self.linear(hidden_size, self.num_v_heads, rngs)
        self.b_proj = self.linear(hidden_size, self.num_v_heads, rngs)
        self.A_log = nnx.Param(_initial_log_rate(rngs.params(), self.num_v_heads))
        self.dt_bias = nnx.Param(_initial_step_bias(rngs.params(), self.num_v_heads))

    def rule_inputs(
        self,
        x: Float[Array, "batch time hidden"],
        q: Float[Array, "batch time heads key"],
        k: Float[Array, "batch time heads key"],
        v: Float[Array, "batch time v_heads value"],
    ) -> RuleInputs:
        step = jax.nn.softplus(self.a_proj(x).astype(jnp.float32) + self.dt_bias[...][None, None])
        g = -jnp.exp(self.A_log[...])[None, None] * step
        return RuleInputs(q, k, v, beta=self.write_strength(self.b_proj(x)), g=g)


def _initial_log_rate(key: PRNGKeyArray, heads: int) -> Float[Array, " heads"]:
    """The logarithm of a number drawn uniformly from (0, 16]; never that of zero."""
    return jnp.log(16.0 * (1.0 - jax.random.uniform(key, (heads,), jnp.float32)))


def _initial_step_bias(key: PRNGKeyArray, heads: int) -> Float[Array, " heads"]:
    """The inverse softplus of a step drawn log-uniformly from [0.001, 0.1]."""
    low, high = math.log(0.001), math.log(0.1)
    step = jnp.exp(jax.random.uniform(key, (heads,), jnp.float32, low, high))
    return step + jnp.log(-jnp.expm1(-step))
