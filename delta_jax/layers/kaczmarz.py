"""Kaczmarz Linear Attention: step sizes for keys that keep their length."""

from jaxtyping import Array, Float

from delta_jax.layers.gated_delta_net import GatedDeltaNet
from delta_jax.layers.mixer import RuleInputs
from delta_jax.layers.norm import l2_normalize
from delta_jax.ops.norm import EPS, inverse_length
from delta_jax.ops.recurrence import repeat_heads

__all__ = ["KaczmarzLinearAttention"]


class KaczmarzLinearAttention(GatedDeltaNet):
    """Gated DeltaNet whose step solves for the value at the key's own length.

        S_t = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T
        beta_t = sigmoid(x_t W_b + b) / (|k_t|^2 + 1e-6)

    with keys that are not normalised. With n = sqrt(|k|^2 + 1e-6) this is the delta rule for the key k / n, the value v / n
    and the step size sigmoid(x W_b + b), which is how it is computed: products of unit keys stay bounded where those of
    beta, k and k do not. So the one difference from Gated DeltaNet is the value's scale.

    Arguments as in `GatedDeltaNet`. Source: Zou, Ren and Liu, "Kaczmarz linear attention", 2026
    (arXiv 2605.08587).

    Examples:
        >>> layer = KaczmarzLinearAttention(16, num_heads=2, head_dim=8, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 5, 16))).shape
        (2, 5, 16)
    """

    beta_bias = True
    unit_qk = False  # the length of k is wanted

    def rule_inputs(
        self,
        x: Float[Array, "batch time hidden"],
        q: Float[Array, "batch time heads key"],
        k: Float[Array, "batch time heads key"],
        v: Float[Array, "batch time v_heads value"],
    ) -> RuleInputs:
        power, rest = (repeat_heads(factor, self.num_v_heads) for factor in inverse_length(k, EPS))
        v = (v.astype(rest.dtype) * power * rest).astype(v.dtype)
        return super().rule_inputs(x, l2_normalize(q), l2_normalize(k), v)
