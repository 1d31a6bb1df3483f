"""Multi-head latent attention: keys and values of all heads from one small vector a token, the only thing cached."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from delta_jax.layers.cached_attention import CachedAttention
from delta_jax.layers.checks import (
    require_dtypes,
    require_flags,
    require_positive_integers,
    require_positive_integers_or_none,
    require_positive_numbers,
    require_rngs,
)
from delta_jax.layers.contained import contained
from delta_jax.layers.norm import RMSNorm
from delta_jax.ops.attention import attend, rotate
from delta_jax.ops.segments import Positions

__all__ = ["LatentAttention"]


class LatentAttention(CachedAttention):
    """Multi-head latent attention (MLA), by itself without positions (NoPE), as in Kimi Linear.

        c, r = split(x W_a)      c = norm(c)      [k, v] = c W_b     for each head, r shared by all of them
        q    = x W_q                              or norm(x W_qa) W_qb
        o_t  = sum_s softmax_s(q_t [k_s, r_s] / sqrt(qk_nope_head_dim + qk_rope_head_dim)) v_s
        y    = (o * sigmoid(x W_g)) W_o           the gate, a number for each head, only when asked for

    With positions, r and the last qk_rope_head_dim channels of each head's q are rotated. The cache holds [c, r]. One token
    is decoded without ever forming keys or values: W_b is applied to the query and to the output instead.

    Args:
        hidden_size: width of x.
        num_heads: heads.
        kv_lora_rank: size of c.
        qk_nope_head_dim: channels of a head's key that come from c.
        qk_rope_head_dim: channels of r. Where there are positions, they live here.
        v_head_dim: size of a head's value.
        q_lora_rank: makes W_q a product of two matrices, of this rank, with a norm between them; None is a single one.
        rope_theta: the base of the rotary embedding's wave lengths; None is no positions.
        rope_interleaved: rotates channels 2i and 2i + 1 together, not one of the first half and one of the second.
        use_head_gate: multiplies each head's output with sigmoid(x W_g), one number a head.
        norm_eps: epsilon of the norms.
        kv_norm_eps: epsilon of the norm of c and of that between the two matrices of q; None is norm_eps.
        initializer_std: standard deviation of every weight matrix at the start.
        dtype: of the computation; softmax and norm are float32 regardless.
        param_dtype: of the parameters.
        rngs: where the initial parameters come from.

    Raises:
        ValueError: an option is impossible, alone or with the others.

    Source: DeepSeek-AI, "DeepSeek-V2", 2024, section 2.1; without positions: Kimi Team, "Kimi Linear", 2025
    (arXiv 2510.26692), section 3; the gate of heads as in Ling 3.0.

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
        q_lora_rank: int | None = None,
        rope_theta: float | None = None,
        rope_interleaved: bool = False,
        use_head_gate: bool = False,
        norm_eps: float = 1e-5,
        kv_norm_eps: float | None = None,
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
        require_positive_integers_or_none(q_lora_rank=q_lora_rank)
        require_flags(rope_interleaved=rope_interleaved, use_head_gate=use_head_gate)
        require_dtypes(dtype=dtype, param_dtype=param_dtype)
        require_rngs(rngs)
        require_positive_numbers(norm_eps=norm_eps, initializer_std=initializer_std)
        kv_norm_eps = norm_eps if kv_norm_eps is None else kv_norm_eps
        require_positive_numbers(kv_norm_eps=kv_norm_eps)
        if rope_theta is not None:
            require_positive_numbers(rope_theta=rope_theta)
            if qk_rope_head_dim % 2:
                raise ValueError(f"qk_rope_head_dim must be even, since pairs are rotated, got {qk_rope_head_dim}")
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
        self.q_lora_rank = q_lora_rank
        self.rope_theta = rope_theta
        self.rope_interleaved = rope_interleaved
        self.use_head_gate = use_head_gate
        self.scale = (qk_nope_head_dim + qk_rope_head_dim) ** -0.5
        self.initializer_std = initializer_std
        self.dtype = jnp.dtype(dtype)
        self.param_dtype = jnp.dtype(param_dtype)

        queries = num_heads * (qk_nope_head_dim + qk_rope_head_dim)
        if q_lora_rank is None:
            self.q_proj = self.linear(hidden_size, queries, rngs)
        else:
            self.q_a_proj = self.linear(hidden_size, q_lora_rank, rngs)
            self.q_norm = RMSNorm(q_lora_rank, eps=kv_norm_eps, param_dtype=param_dtype)
            self.q_b_proj = self.linear(q_lora_rank, queries, rngs)
        self.kv_a_proj = self.linear(hidden_size, kv_lora_rank + qk_rope_head_dim, rngs)
        self.kv_norm = RMSNorm(kv_lora_rank, eps=kv_norm_eps, param_dtype=param_dtype)
        self.kv_b_proj = self.linear(kv_lora_rank, num_heads * (qk_nope_head_dim + v_head_dim), rngs)
        if use_head_gate:
            self.g_proj = self.linear(hidden_size, num_heads, rngs)
        self.o_proj = self.linear(num_heads * v_head_dim, hidden_size, rngs)

    @property
    def token_shapes(self) -> tuple[tuple[int, ...], ...]:
        return ((self.kv_lora_rank + self.qk_rope_head_dim,),)

    def project(
        self, x: Float[Array, "batch time hidden"], position: Int[Array, "batch time"]
    ) -> tuple[Float[Array, "batch time heads key"], tuple[Array, ...]]:
        latent, shared = jnp.split(self.kv_a_proj(x), [self.kv_lora_rank], axis=-1)
        q = self.q_proj(x) if self.q_lora_rank is None else self.q_b_proj(self.q_norm(self.q_a_proj(x)))
        q = q.reshape(*x.shape[:2], self.num_heads, -1)
        if self.rope_theta is not None:
            own, turned = jnp.split(q, [self.qk_nope_head_dim], axis=-1)
            q = jnp.concatenate([own, self._rotated(turned, position)], axis=-1)
            shared = self._rotated(shared[:, :, None], position)[:, :, 0]
        return q, (jnp.concatenate([self.kv_norm(latent), shared], axis=-1),)

    def _rotated(self, x: Array, position: Array) -> Array:
        assert self.rope_theta is not None
        channels, interleaved = self.qk_rope_head_dim, self.rope_interleaved
        return rotate(x, position, theta=self.rope_theta, channels=channels, interleaved=interleaved)

    def _mix(
        self,
        x: Float[Array, "batch time hidden"],
        q: Float[Array, "batch time heads key"],
        entries: tuple[Array, ...],
        positions: tuple[Positions, Positions] | None,
    ) -> Float[Array, "batch time hidden"]:
        o = (self._attend_latents if q.shape[1] == 1 else self._attend_expanded)(q, entries[0], positions)
        if not self.use_head_gate:
            return contained(self.o_proj, o.reshape(*x.shape[:2], -1))

        def gated(x: Array, o: Array) -> Array:
            return self.o_proj((o * jax.nn.sigmoid(self.g_proj(x))[..., None]).reshape(*x.shape[:2], -1))

        return contained(gated, x, o)

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
