"""DeltaNet: the delta rule as it stands, with a learned write strength."""

from typing import Unpack

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from delta_jax.layers.checks import require_flags
from delta_jax.layers.mixer import Mixer, MixerOptions, MixerSettings, RuleInputs
from delta_jax.ops.precision import accumulator_dtype

__all__ = ["DeltaNet"]

NORMS = ("l2", "sum")


class DeltaNet(Mixer):
    """Parallel linear transformer with the delta rule: `beta = sigmoid(x W_b)` and no decay.

        S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T

    Args:
        hidden_size: width of x.
        num_heads, head_dim, expand_v, use_output_gate, allow_negative_eigenvalues, use_output_norm, qk_activation: as in
            `MixerSettings`.
        use_beta: without it beta is 1, or 2 with allow_negative_eigenvalues.
        qk_norm: brings each head of q and k to the length 1, "l2", or its channels to the sum 1, "sum".
        rngs: where the initial parameters come from.
        options: the other options, see `MixerSettings`.

    Source: Yang, Wang, Zhang, Shen and Kim, "Parallelizing linear transformers with the delta rule over
    sequence length", 2024 (arXiv 2406.06484); beta in [0, 2] after Grazzi, Siems et al., 2024
    (arXiv 2411.12537); the sum and the other activations: Schlag, Irie and Schmidhuber, "Linear transformers are secretly
    fast weight programmers", 2021 (arXiv 2102.11174).

    Examples:
        >>> layer = DeltaNet(16, num_heads=2, allow_negative_eigenvalues=True, rngs=nnx.Rngs(0))
        >>> x = jnp.ones((2, 5, 16))
        >>> layer(x).shape
        (2, 5, 16)
        >>> y, cache = layer(x, return_cache=True)  # decoding goes on from the cache
        >>> cache.state.shape
        (2, 2, 8, 8)
    """

    weighs_streams = False

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int = 4,
        head_dim: int | None = None,
        expand_v: float = 1.0,
        use_output_gate: bool = False,
        allow_negative_eigenvalues: bool = False,
        use_beta: bool = True,
        use_output_norm: bool = True,
        qk_activation: str = "silu",
        qk_norm: str = "l2",
        rngs: nnx.Rngs,
        **options: Unpack[MixerOptions],
    ):
        require_flags(use_beta=use_beta)
        if qk_norm not in NORMS:
            raise ValueError(f"qk_norm must be one of {', '.join(NORMS)}, got {qk_norm!r}")
        settings = MixerSettings(
            hidden_size=hidden_size,
            num_heads=num_heads,
            head_dim=head_dim,
            expand_v=expand_v,
            use_output_gate=use_output_gate,
            allow_negative_eigenvalues=allow_negative_eigenvalues,
            use_output_norm=use_output_norm,
            qk_activation=qk_activation,
            **options,
        )
        super().__init__(settings, rngs=rngs)
        self.use_beta, self.unit_qk = use_beta, qk_norm == "l2"
        if use_beta:
            self.b_proj = self.linear(hidden_size, self.num_v_heads, rngs)

    def rule_inputs(
        self,
        x: Float[Array, "batch time hidden"],
        q: Float[Array, "batch time heads key"],
        k: Float[Array, "batch time heads key"],
        v: Float[Array, "batch time v_heads value"],
    ) -> RuleInputs:
        if self.use_beta:
            beta = self.write_strength(self.b_proj(x))
        else:
            beta = jnp.full_like(v[..., 0], 2.0 if self.settings.allow_negative_eigenvalues else 1.0, jnp.float32)
        if not self.unit_qk:
            q, k = _sum_normalize(q), _sum_normalize(k)
        return RuleInputs(q, k, v, beta=beta)


def _sum_normalize(x: Float[Array, "*leading size"]) -> Float[Array, "*leading size"]:
    """Divides x by its sum over the last axis; where that is zero, as after relu, by one."""
    total = jnp.sum(x, axis=-1, keepdims=True, dtype=accumulator_dtype(x.dtype))
    return (x.astype(total.dtype) / jnp.where(total == 0, 1, total)).astype(x.dtype)
