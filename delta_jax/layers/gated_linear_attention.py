"""Gated linear attention: a decay per channel and no erase."""

from typing import Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from delta_jax.layers.checks import (
    require_positive_integers,
    require_positive_integers_or_none,
    require_positive_numbers,
)
from delta_jax.layers.linear_attention import LinearAttention
from delta_jax.layers.low_rank import LowRank
from delta_jax.layers.mixer import MixerOptions, RuleInputs

__all__ = ["GatedLinearAttention"]


class GatedLinearAttention(LinearAttention):
    """Linear attention on a state each channel of which decays by itself.

        S_t = Diag(exp g_t) S_{t-1} + k_t v_t^T        g_t = log_sigmoid(x_t W_down W_up + b) / 16

    Args:
        hidden_size: width of x.
        num_heads: heads of q and k.
        head_dim: key size per head; None is hidden_size / (2 * num_heads).
        expand_v, use_output_gate: as in `MixerSettings`.
        gate_rank: rank of W_down W_up.
        gate_normalizer: divides the log decay.
        rngs: where the initial parameters come from.
        options: the other options, see `MixerSettings`; no short convolution unless asked for.

    Source: Yang, Wang, Shen, Panda and Kim, "Gated linear attention transformers with hardware-efficient training", 2023
    (arXiv 2312.06635) section 4.

    Examples:
        >>> layer = GatedLinearAttention(16, num_heads=2, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 5, 16))).shape
        (2, 5, 16)
        >>> layer.init_cache(batch_size=2).state.shape  # keys of half the width
        (2, 2, 4, 8)
    """

    weighs_streams = False

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int = 4,
        head_dim: int | None = None,
        expand_v: float = 2.0,
        use_output_gate: bool = True,
        gate_rank: int = 16,
        gate_normalizer: float = 16.0,
        rngs: nnx.Rngs,
        **options: Unpack[MixerOptions],
    ):
        require_positive_integers(hidden_size=hidden_size, num_heads=num_heads, gate_rank=gate_rank)
        require_positive_integers_or_none(head_dim=head_dim)
        require_positive_numbers(gate_normalizer=gate_normalizer)
        if head_dim is None:
            if hidden_size % (2 * num_heads):
                raise ValueError(f"num_heads must divide hidden_size / 2 unless head_dim is given, got {num_heads}")
            head_dim = hidden_size // (2 * num_heads)
        super().__init__(
            hidden_size,
            num_heads=num_heads,
            head_dim=head_dim,
            expand_v=expand_v,
            use_output_gate=use_output_gate,
            rngs=rngs,
            **options,
        )
        self.gate_normalizer = gate_normalizer
        self.f_proj = LowRank(self, hidden_size, gate_rank, self.num_v_heads * self.key_dim, rngs)

    def rule_inputs(
        self,
        x: Float[Array, "batch time hidden"],
        q: Float[Array, "batch time heads key"],
        k: Float[Array, "batch time heads key"],
        v: Float[Array, "batch time v_heads value"],
    ) -> RuleInputs:
        g = jax.nn.log_sigmoid(self.f_proj(x).astype(jnp.float32)) / self.gate_normalizer
        return RuleInputs(q, k, v, g=g.reshape(*v.shape[:-1], self.key_dim))
