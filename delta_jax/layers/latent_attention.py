"""Multi-head latent attention: keys and values of all heads from one small vector a token, the only thing cached."""

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from delta_jax.layers.cached_attention import CachedAttention
from delta_jax.layers.checks import (
    require_dtypes,
    require_positive_integers,
    require_positive_numbers,
    require_rngs,
)
from delta_jax.layers.contained import contained
from delta_jax.layers.norm import RMSNorm
from delta_jax.ops.attention import attend
from delta_jax.ops.segments import Positions

__all__ = ["LatentAttention"]


class LatentAttention(CachedAttention):
    """Multi-head latent attention (MLA) without positions (NoPE), as in Kimi Linear.

        c, r = split(x W_a)      c = norm(c)      [k, v] = c W_b     for each head, r shared by all of them
        o_t  = sum_s softmax_s(q_t [k_s, r_s] / sqrt(qk_nope_head_dim + qk_rope_head_dim)) v_s

    The cache holds [c, r]. One token is decoded without ever forming keys or values: W_b is applied to the query
    and to the output instead.

    Args:
        hidden_size: width of x.
        num_heads: heads.
        kv_lora_rank: size of c.
        qk_nope_head_dim: channels of a head's key that come from c.
        qk_rope_head_dim: channels of r. (Where there are positions, they live here.)
        v_head_dim: size of a head's value.
        norm_eps: epsilon of the norm of c.
        initializer_std: standard deviation of every weight matrix at the start.
        dtype: of the computation; softmax and norm are float32 regardless.
        param_dtype: of the parameters.
        rngs: where the initial parameters come from.

    Raises:
        ValueError: an option is impossible, alone or with the others.

    Source: DeepSeek-AI, "DeepSeek-V2", 2024, section 2.1; without positions: Kimi Team, "Kimi Linear", 2025
    (arXiv 2510.26692), section 3.

    Examples:
        >>> sizes = {"kv_lora_rank": 6, "qk_nope_head_dim": 8, "qk_rope_head_dim": 2, "v_head_dim": 8}
        >>> layer = LatentAttention(16, num_heads=2, **sizes, rngs=nnx.Rngs(0))
        >>> y, cache = layer(jnp.ones((2, 5, 16)), return_cache=True)
        >>> y.shape, [entry.shape for entry in cache.entries]  # c and r of each token, for all heads
        ((2, 5, 16), [(2, 5, 8)])
    """

    window = None

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int = 32,
        kv_lora_rank: int = 512,
        qk_nope_head_dim: int = 128,
        qk_rope_head_dim: int = 64,
        v_head_dim: int = 128,
        norm_eps: float = 1e-5,
        initializer_std: float = 0.02,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        require_positive_integers(
            hidden_size=hidden_size,
            num_heads=num_heads,
            kv_lora_rank=kv_lora_rank,
            qk_nope_head_dim=qk_nope_head_dim,
            qk_rope_head_dim=qk_rope_head_dim,
            v_head_dim=v_head_dim,
        )
        require_dtypes(dtype=dtype, param_dtype=param_dtype)
        require_rngs(rngs)
        require_positive_numbers(norm_eps=norm_eps, initializer_std=initializer_std)
        if v_head_dim > qk_nope_head_dim + qk_rope_head_dim:
            raise ValueError(
                f"v_head_dim must be at most qk_nope_head_dim + qk_rope_head_dim, got {v_head_dim} and "
                f"{qk_nope_head_dim} + {qk_rope_head_dim}"
            )
        self.hidden_size = hidden_size
        self.num_heads = num_heads
        self.kv_lora_rank = kv_lora_rank
        self.qk_nope_head_dim = qk_nope_head_dim
        self.qk_rope_head_dim = qk_rope_head_dim
        self.v_head_dim = v_head_dim
        self.scale = (qk_nope_head_dim + qk_rope_head_dim) ** -0.5
        self.initializer_std = initializer_std
        self.dtype = jnp.dtype(dtype)
        self.param_dtype = jnp.dtype(param_dtype)

        self.q_proj = self.linear(hidden_size, num_heads * (qk_nope_head_dim + qk_rope_head_dim), rngs)
        self.kv_a_proj = self.linear(hidden_size, kv_lora_rank + qk_rope_head_dim, rngs)
        self.kv_norm = RMSNorm(kv_lora_rank, eps=norm_eps, param_dtype=param_dtype)
        self.kv_b_proj = self.linear(kv_lora_rank, num_heads * (qk_nope_head_dim + v_head_dim), rngs)
        self.o_proj = self.linear(num_heads * v_head_dim, hidden_size, rngs)

    @property
    def token_shapes(self) -> tuple[tuple[int, ...], ...]:
        return ((self.kv_lora_rank + self.qk_rope_head_dim,),)

    def project(
        self, x: Float[Array, "batch time hidden"], position: Int[Array, "batch time"]
    ) -> tuple[Float[Array, "batch time heads key"], tuple[Array, ...]]:
        latent, shared = jnp.split(self.kv_a_proj(x), [self.kv_lora_rank], axis=-1)
        q = self.q_proj(x).reshape(*x.shape[:2], self.num_heads, -1)
        return q, (jnp.concatenate([self.kv_norm(latent), shared], axis=-1),)

    def _mix(
        self,
        x: Float[Array, "batch time hidden"],
        q: Float[Array, "batch time heads key"],
        entries: tuple[Array, ...],
        positions: tuple[Positions, Positions] | None,
    ) -> Float[Array, "batch time hidden"]:
        o = (self._attend_latents if q.shape[1] == 1 else self._attend_expanded)(q, entries[0], positions)
        return contained(self.o_proj, o.reshape(*x.shape[:2], -1))

    def _attend_expanded(self, q: Array, entries: Array, positions: tuple[Positions, Positions] | None) -> Array:
        latent, shared = jnp.split(entries, [self.kv_lora_rank], axis=-1)
        both = contained(self.kv_b_proj, latent).reshape(*latent.shape[:2], self.num_heads, -1)
        k, v = jnp.split(both, [self.qk_nope_head_dim], axis=-1)
        shared = jnp.broadcast_to(shared[:, :, None], (*k.shape[:3], self.qk_rope_head_dim))
        return attend(q, jnp.concatenate([k, shared], axis=-1), v, scale=self.scale, positions=positions)

    def _attend_latents(self, q: Array, entries: Array, positions: tuple[Positions, Positions] | None) -> Array:
        weight = self.kv_b_proj.kernel[...].astype(self.dtype).reshape(self.kv_lora_rank, self.num_heads, -1)
        to_key, to_value = jnp.split(weight, [self.qk_nope_head_dim], axis=-1)
        own, shared = jnp.split(q, [self.qk_nope_head_dim], axis=-1)
        own = contained(lambda own: jnp.einsum("bthk,lhk->bthl", own, to_key), own)
        q = jnp.concatenate([own, shared], axis=-1)
        one = entries[:, :, None]  # a single key head, whose key is its value too
        o = attend(q, one, one, scale=self.scale, positions=positions)[..., : self.kv_lora_rank]
        return contained(lambda o: jnp.einsum("bthl,lhv->bthv", o, to_value), o)
