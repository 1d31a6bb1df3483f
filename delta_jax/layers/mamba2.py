"""Mamba-2: the state space dual, as linear attention with a step of its own for every token."""

from dataclasses import replace
from typing import Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from delta_jax.layers.checks import require_positive_integers
from delta_jax.layers.contained import finite_tokens, select_finite
from delta_jax.layers.gates import initial_log_rate, initial_step_bias
from delta_jax.layers.mixer import Mixer, MixerOptions, MixerSettings, Rule, RuleInputs
from delta_jax.layers.norm import RMSNorm
from delta_jax.layers.options import GATE_ACTIVATIONS
from delta_jax.ops import linear_attention, linear_attention_step

__all__ = ["Mamba2"]


class Mamba2(Mixer):
    """A diagonal state space model that every token discretises with its own step.

        S_t = exp(-dt_t exp(A_log)) S_{t-1} + dt_t B_t x_t^T         dt_t = softplus(u_t W_dt + dt_bias)
        o_t = S_t^T C_t + D x_t                                      y_t = rmsnorm(o_t * silu(u_t W_z)) W_o

    In the names of the other members C, B and x are q, k and v, and z is the output gate, which comes before the norm,
    of all heads at once, or of each of norm_groups groups of them. Nothing is scaled by the key size.

    Args:
        hidden_size: width of the input u.
        num_heads: groups, each of which shares B and C.
        head_dim: size of the state, that of B and C.
        expand_v: size of a head of x, as a multiple of head_dim.
        use_output_gate: whether there is a z.
        norm_groups: groups of channels that are normalised by themselves.
        num_v_heads: heads of x; None is as many as hold twice the hidden size.
        rngs: where the initial parameters come from.
        options: the other options, see `MixerSettings`; the short convolutions have a bias unless it is refused.

    Source: Dao and Gu, "Transformers are SSMs", 2024 (arXiv 2405.21060) section 7.

    Examples:
        >>> layer = Mamba2(16, num_heads=1, head_dim=8, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 5, 16))).shape
        (2, 5, 16)
    """

    rule = Rule(linear_attention, linear_attention_step)
    scale = 1.0

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int = 1,
        head_dim: int | None = 128,
        expand_v: float = 0.5,
        use_output_gate: bool = True,
        norm_groups: int = 1,
        rngs: nnx.Rngs,
        **options: Unpack[MixerOptions],
    ):
        require_positive_integers(norm_groups=norm_groups)
        options.setdefault("conv_bias", options.get("use_short_conv", True))
        settings = MixerSettings(
            hidden_size=hidden_size,
            num_heads=num_heads,
            head_dim=head_dim,
            expand_v=expand_v,
            use_output_gate=use_output_gate,
            **options,
        )
        if settings.num_v_heads is None:
            heads, rest = divmod(2 * hidden_size, settings.value_dim)
            if rest:
                raise ValueError(f"expand_v must make heads of x that fill {2 * hidden_size}, got {settings.value_dim}")
            settings = replace(settings, num_v_heads=heads)
        super().__init__(settings, rngs=rngs)
        self.a_proj = self.linear(hidden_size, self.num_v_heads, rngs)
        self.A_log = nnx.Param(initial_log_rate(rngs.params(), self.num_v_heads, low=1.0))
        self.dt_bias = nnx.Param(initial_step_bias(rngs.params(), self.num_v_heads))
        self.D = nnx.Param(jnp.ones((self.num_v_heads,), jnp.float32))
        size = self.num_v_heads * self.value_dim
        if size % norm_groups:
            raise ValueError(f"norm_groups must divide the {size} channels of x, got {norm_groups}")
        self.o_norm = RMSNorm(size, eps=settings.eps, groups=norm_groups, param_dtype=settings.param_dtype)

    def rule_inputs(
        self,
        x: Float[Array, "batch time hidden"],
        q: Float[Array, "batch time heads key"],
        k: Float[Array, "batch time heads key"],
        v: Float[Array, "batch time v_heads value"],
    ) -> RuleInputs:
        step = jax.nn.softplus(self.a_proj(x).astype(jnp.float32) + self.dt_bias[...][None, None])
        g = -jnp.exp(self.A_log[...])[None, None] * step
        return RuleInputs(q, k, (step[..., None] * v.astype(jnp.float32)).astype(v.dtype), g=g)

    def output(
        self,
        x: Float[Array, "batch time hidden"],
        v: Float[Array, "batch time v_heads value"],
        o: Float[Array, "batch time v_heads value"],
    ) -> Float[Array, "batch time channels"]:
        v, o = (select_finite(finite_tokens(v, o), y, 0.0) for y in (v, o))
        o = (o + self.D[...].astype(o.dtype)[None, None, :, None] * v).reshape(*x.shape[:2], -1)
        if self.use_output_gate:
            o = o * GATE_ACTIVATIONS[self.settings.output_gate_activation](self.g_proj(x)).astype(o.dtype)
        return self.o_norm(o).astype(self.dtype)
