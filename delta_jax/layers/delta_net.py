"""DeltaNet: the delta rule as it stands, with a learned write strength."""

from typing import Unpack

from flax import nnx
from jaxtyping import Array, Float

from delta_jax.layers.mixer import Mixer, MixerOptions, MixerSettings, RuleInputs
from delta_jax.layers.norm import l2_normalize

__all__ = ["DeltaNet"]


class DeltaNet(Mixer):
    """Parallel linear transformer with the delta rule: `beta = sigmoid(x W_b)` and no decay.

        S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T

    Args:
        hidden_size: width of x.
        num_heads, head_dim, expand_v, use_output_gate, allow_negative_eigenvalues: as in `MixerSettings`.
        rngs: where the initial parameters come from.
        options: the other options, see `MixerSettings`.

    Source: Yang, Wang, Zhang, Shen and Kim, "Parallelizing linear transformers with the delta rule over
    sequence length", 2024 (arXiv 2406.06484); beta in [0, 2] after Grazzi, Siems et al., 2024
    (arXiv 2411.12537).

    Examples:
        >>> layer = DeltaNet(16, num_heads=2, allow_negative_eigenvalues=True, rngs=nnx.Rngs(0))
        >>> x = jnp.ones((2, 5, 16))
        >>> layer(x).shape
        (2, 5, 16)
        >>> y, cache = layer(x, return_cache=True)  # decoding goes on from the cache
        >>> cache.state.shape
        (2, 2, 8, 8)
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int = 4,
        head_dim: int | None = None,
        expand_v: float = 1.0,
        use_output_gate: bool = False,
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
        self.b_proj = self.linear(hidden_size, self.num_v_heads, rngs)

    def rule_inputs(
        self,
        x: Float[Array, "batch time hidden"],
        q: Float[Array, "batch time heads key"],
        k: Float[Array, "batch time heads key"],
        v: Float[Array, "batch time v_heads value"],
    ) -> RuleInputs:
        return RuleInputs(l2_normalize(q), l2_normalize(k), v, beta=self.write_strength(self.b_proj(x)))
