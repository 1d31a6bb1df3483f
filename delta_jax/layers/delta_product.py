"""DeltaProduct: several delta-rule writes a token, without and with a decay."""

from typing import ClassVar, Unpack

from flax import nnx
from jaxtyping import Array, Float

from delta_jax.layers.checks import require_positive_integers
from delta_jax.layers.gates import initial_log_rate, initial_step_bias, log_decay
from delta_jax.layers.mixer import Mixer, MixerOptions, MixerSettings, Rule, RuleInputs
from delta_jax.ops import delta_product, delta_product_step

__all__ = ["DeltaProduct", "GatedDeltaProduct"]


class DeltaProduct(Mixer):
    """A state that every token multiplies by a product of n generalised Householder matrices.

        S_t = (I - beta_n k_n k_n^T) ... (I - beta_1 k_1 k_1^T) S_{t-1} + what the n writes leave

    Every write has a key, a value and a step size of its own; in the projections the write is the outermost channel. With
    one write it is DeltaNet.

    Args:
        hidden_size: width of x.
        num_householder: writes a token, n.
        num_heads, head_dim, expand_v, use_output_gate, allow_negative_eigenvalues: as in `MixerSettings`.
        rngs: where the initial parameters come from.
        options: the other options, see `MixerSettings`.

    Source: Siems, Carstensen, Zela, Hutter, Pontil and Grazzi, "DeltaProduct: improving state-tracking in linear RNNs
    via Householder products", 2025 (arXiv 2502.10297) section 3.

    Examples:
        >>> layer = DeltaProduct(16, num_householder=2, num_heads=2, head_dim=8, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 5, 16))).shape
        (2, 5, 16)
        >>> layer.k_proj.kernel.shape  # two keys a token
        (16, 32)
    """

    rule = Rule(delta_product, delta_product_step)
    unit_qk = True
    weighs_streams = False
    decays: ClassVar[bool] = False

    def __init__(
        self,
        hidden_size: int,
        *,
        num_householder: int = 2,
        num_heads: int = 6,
        head_dim: int | None = 256,
        expand_v: float = 2.0,
        use_output_gate: bool = True,
        allow_negative_eigenvalues: bool = True,
        rngs: nnx.Rngs,
        **options: Unpack[MixerOptions],
    ):
        require_positive_integers(num_householder=num_householder)
        settings = MixerSettings(
            hidden_size=hidden_size,
            num_householder=num_householder,
            num_heads=num_heads,
            head_dim=head_dim,
            expand_v=expand_v,
            use_output_gate=use_output_gate,
            allow_negative_eigenvalues=allow_negative_eigenvalues,
            **options,
        )
        super().__init__(settings, rngs=rngs)
        self.b_proj = self.linear(hidden_size, num_householder * self.num_v_heads, rngs)
        if self.decays:
            self.a_proj = self.linear(hidden_size, self.num_v_heads, rngs)
            self.A_log = nnx.Param(initial_log_rate(rngs.params(), self.num_v_heads))
            self.dt_bias = nnx.Param(initial_step_bias(rngs.params(), self.num_v_heads))

    def rule_inputs(
        self,
        x: Float[Array, "batch time hidden"],
        q: Float[Array, "batch time heads key"],
        k: Float[Array, "batch time *writes heads key"],
        v: Float[Array, "batch time *writes v_heads value"],
    ) -> RuleInputs:
        beta = self.write_strength(self.b_proj(x)).reshape(v.shape[:-1])
        g = log_decay(self.a_proj(x), self.A_log[...], self.dt_bias[...]) if self.decays else None
        return RuleInputs(q, k, v, beta=beta, g=g)


class GatedDeltaProduct(DeltaProduct):
    """DeltaProduct on a state that decays once a token, before the first write; with one write it is Gated DeltaNet.

    Arguments as in `DeltaProduct`; the decay is that of `GatedDeltaNet`.

    Source: arXiv 2502.10297 section 3, with the decay of arXiv 2412.06464.

    Examples:
        >>> layer = GatedDeltaProduct(16, num_householder=2, num_heads=2, head_dim=8, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 5, 16))).shape
        (2, 5, 16)
    """

    decays = True
