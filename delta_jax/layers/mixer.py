"""What every member of the family shares: projections, short convolution, normalisation, output and cache.

    q, k = l2norm(silu(conv(x W_q))), l2norm(silu(conv(x W_k)))      v = silu(conv(x W_v))
    o    = delta_rule(member's choice of q, k, v, beta, g, erase)
    y    = (rmsnorm(o) * silu(x W_g)) W_o                            the gate only with use_output_gate

A member is a subclass that adds its own parameters and says in `rule_inputs` how the inputs of the op come
from x.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypedDict

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from delta_jax.layers.norm import RMSNorm, l2_normalize
from delta_jax.layers.token_mixer import TokenMixer
from delta_jax.ops import delta_rule, delta_rule_step
from delta_jax.ops.short_convolution import short_convolution
from delta_jax.parallel import by_heads, indivisible

__all__ = ["Mixer", "MixerCache", "MixerOptions", "RuleInputs"]


class MixerOptions(TypedDict, total=False):
    """The keyword arguments of `Mixer` whose defaults every member shares."""

    num_v_heads: int | None
    conv_size: int
    use_short_conv: bool
    norm_eps: float
    initializer_std: float
    chunk_size: int | None
    implementation: str | None
    dtype: DTypeLike
    param_dtype: DTypeLike


class RuleInputs(NamedTuple):
    """The arguments of `delta_jax.delta_rule`, with its shapes and defaults."""

    q: Float[Array, "batch time heads key"]
    k: Float[Array, "batch time heads key"]
    v: Float[Array, "batch time v_heads value"]
    beta: Float[Array, "batch time v_heads"] | None = None
    g: Float[Array, "batch time v_heads *key"] | None = None
    erase: Float[Array, "batch time erase_heads key"] | None = None


class MixerCache(NamedTuple):
    """All a mixer remembers of the past; its size does not depend on how long that past is.

    Attributes:
        convolution: the tails of the q, k and v convolutions, each [B, conv_size - 1, channels], or ().
        state: [B, Hv, K, V] float32.
        segment_id: [B] int32, the segment that the last token belonged to; 0 where no ids were given.
    """

    convolution: tuple[Float[Array, "batch tail channels"], ...]
    state: Float[Array, "batch v_heads key value"]
    segment_id: Int[Array, " batch"]

    def keep(self, rows: Bool[Array, " batch"]) -> "MixerCache":
        """Forgets the past of the rows that are False."""

        def select(x: Array) -> Array:
            return jnp.where(rows.reshape((-1,) + (1,) * (x.ndim - 1)), x, jnp.zeros((), x.dtype))

        return jax.tree.map(select, self)


class ShortConvolution(nnx.Module):
    """The weights of `short_convolution`, followed by SiLU."""

    def __init__(self, size: int, channels: int, *, initializer_std: float, param_dtype: DTypeLike, rngs: nnx.Rngs):
        self.kernel = nnx.Param(initializer_std * jax.random.normal(rngs.params(), (size, channels), param_dtype))

    def __call__(
        self,
        x: Float[Array, "batch time channels"],
        segment_ids: Int[Array, "batch time"] | None,
        cache: Float[Array, "batch tail channels"] | None,
    ) -> tuple[Float[Array, "batch time channels"], Float[Array, "batch tail channels"]]:
        y, tail = short_convolution(x, self.kernel[...], segment_ids=segment_ids, cache=cache)
        return jax.nn.silu(y), tail


class Mixer(TokenMixer):
    """A token mixer built on the delta rule; subclasses choose the inputs of the rule.

    Args:
        hidden_size: width of x.
        num_heads: heads of q and k.
        head_dim: key size per head; None is hidden_size / num_heads.
        expand_v: value size per head, as a multiple of head_dim.
        use_output_gate: multiplies the normalised output with silu(x W_g).
        allow_negative_eigenvalues: beta in [0, 2] in place of [0, 1].
        num_v_heads: heads of v and of the state, a multiple of num_heads; None is num_heads.
        conv_size: width of the short convolutions, in tokens.
        use_short_conv: without it SiLU follows the projections directly.
        norm_eps: epsilon of the output norm.
        initializer_std: standard deviation of every weight matrix and convolution at the start.
        chunk_size, implementation: handed to `delta_jax.delta_rule`.
        dtype: of the computation; norms, decays and the state are float32 regardless.
        param_dtype: of the parameters.
        rngs: where the initial parameters come from.

    Raises:
        ValueError: an option is impossible, alone or with the others.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int,
        head_dim: int | None,
        expand_v: float,
        use_output_gate: bool,
        allow_negative_eigenvalues: bool,
        num_v_heads: int | None = None,
        conv_size: int = 4,
        use_short_conv: bool = True,
        norm_eps: float = 1e-5,
        initializer_std: float = 0.02,
        chunk_size: int | None = None,
        implementation: str | None = None,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        _require_positive_integers(
            hidden_size=hidden_size,
            num_heads=num_heads,
            conv_size=conv_size,
            head_dim=head_dim,
            num_v_heads=num_v_heads,
            chunk_size=chunk_size,
        )
        for name, flag in {
            "use_output_gate": use_output_gate,
            "allow_negative_eigenvalues": allow_negative_eigenvalues,
            "use_short_conv": use_short_conv,
        }.items():
            if not isinstance(flag, bool):
                raise ValueError(f"{name} must be true or false, got {flag!r}")
        for name, number in {
            "expand_v": expand_v,
            "norm_eps": norm_eps,
            "initializer_std": initializer_std,
        }.items():
            if not isinstance(number, int | float) or not number > 0:
                raise ValueError(f"{name} must be a positive number, got {number!r}")
        if head_dim is None:
            if hidden_size % num_heads:
                raise ValueError(f"num_heads must divide hidden_size unless head_dim is given, got {num_heads}")
            head_dim = hidden_size // num_heads
        num_v_heads = num_heads if num_v_heads is None else num_v_heads
        if num_v_heads % num_heads:
            raise ValueError(f"num_v_heads must be a multiple of num_heads, got {num_v_heads} and {num_heads}")
        value_dim = round(head_dim * expand_v)
        if value_dim < 1 or abs(value_dim - head_dim * expand_v) > 1e-6:
            raise ValueError(f"expand_v must make head_dim * expand_v a positive integer, got {expand_v} * {head_dim}")

        self.hidden_size = hidden_size
        self.num_heads = num_heads
        self.num_v_heads = num_v_heads
        self.key_dim = head_dim
        self.value_dim = value_dim
        self.conv_size = conv_size
        self.use_short_conv = use_short_conv
        self.use_output_gate = use_output_gate
        self.allow_negative_eigenvalues = allow_negative_eigenvalues
        self.initializer_std = initializer_std
        self.chunk_size = chunk_size
        self.implementation = implementation
        self.dtype = jnp.dtype(dtype)
        self.param_dtype = jnp.dtype(param_dtype)

        key_size, value_size = num_heads * head_dim, num_v_heads * value_dim
        self.q_proj = self.linear(hidden_size, key_size, rngs)
        self.k_proj = self.linear(hidden_size, key_size, rngs)
        self.v_proj = self.linear(hidden_size, value_size, rngs)
        if use_short_conv:
            self.q_conv = self._convolution(key_size, rngs)
            self.k_conv = self._convolution(key_size, rngs)
            self.v_conv = self._convolution(value_size, rngs)
        if use_output_gate:
            self.g_proj = self.linear(hidden_size, value_size, rngs)
        self.o_norm = RMSNorm(value_dim, eps=norm_eps, param_dtype=param_dtype)
        self.o_proj = self.linear(value_size, hidden_size, rngs)

    def linear(self, inputs: int, outputs: int, rngs: nnx.Rngs) -> nnx.Linear:
        """A projection without bias, in the layer's dtypes."""
        return nnx.Linear(
            inputs,
            outputs,
            use_bias=False,
            kernel_init=nnx.initializers.normal(self.initializer_std),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            rngs=rngs,
        )

    def _convolution(self, channels: int, rngs: nnx.Rngs) -> ShortConvolution:
        return ShortConvolution(
            self.conv_size,
            channels,
            initializer_std=self.initializer_std,
            param_dtype=self.param_dtype,
            rngs=rngs,
        )

    def rule_inputs(
        self,
        x: Float[Array, "batch time hidden"],
        q: Float[Array, "batch time heads key"],
        k: Float[Array, "batch time heads key"],
        v: Float[Array, "batch time v_heads value"],
    ) -> RuleInputs:
        """The inputs of the delta rule: what makes one member differ from another."""
        raise NotImplementedError

    def write_strength(self, logits: Float[Array, "*leading"]) -> Float[Array, "*leading"]:
        """`sigmoid(logits)` in float32, or twice that with allow_negative_eigenvalues."""
        beta = jax.nn.sigmoid(logits.astype(jnp.float32))
        return 2.0 * beta if self.allow_negative_eigenvalues else beta

    def init_cache(self, batch_size: int, *, length: int | None = None) -> MixerCache:
        """The cache of `batch_size` sequences that have not begun; its size does not depend on their length."""
        key_size, value_size = self.num_heads * self.key_dim, self.num_v_heads * self.value_dim
        sizes = (key_size, key_size, value_size) if self.use_short_conv else ()
        return MixerCache(
            tuple(jnp.zeros((batch_size, self.conv_size - 1, size), self.dtype) for size in sizes),
            jnp.zeros((batch_size, self.num_v_heads, self.key_dim, self.value_dim), jnp.float32),
            jnp.zeros((batch_size,), jnp.int32),
        )

    def __call__(
        self,
        x: Float[Array, "batch time hidden"],
        *,
        segment_ids: Int[Array, "batch time"] | None = None,
        cache: MixerCache | None = None,
        return_cache: bool = False,
    ) -> Float[Array, "batch time hidden"] | tuple[Float[Array, "batch time hidden"], MixerCache]:
        """Mixes the tokens of every sequence causally.

        Args:
            x: [B, T, hidden_size].
            segment_ids: [B, T] integers; nothing passes from one segment to the next. None continues the
                segment of the cache (a new cache is in segment 0).
            cache: what a former call returned, or `init_cache`; None starts anew.
            return_cache: return the new cache as well, which is always done when a cache is given.

        Returns:
            y [B, T, hidden_size] in the layer's dtype, or (y, cache).
        """
        y, new_cache = self.with_cache(x, segment_ids, cache)
        return (y, new_cache) if return_cache or cache is not None else y

    def with_cache(
        self,
        x: Float[Array, "batch time hidden"],
        segment_ids: Int[Array, "batch time"] | None,
        cache: MixerCache | None,
    ) -> tuple[Float[Array, "batch time hidden"], MixerCache]:
        """What calling the layer with return_cache=True does."""
        x = x.astype(self.dtype)
        if cache is not None and segment_ids is not None:
            cache = cache.keep(segment_ids[:, 0] == cache.segment_id)
        q, k, v, tails = self._project(x, segment_ids, cache)
        inputs = self.rule_inputs(x, l2_normalize(q), l2_normalize(k), v)
        o, state = self._apply_rule(inputs, segment_ids, cache)
        o = self.o_norm(o)
        if self.use_output_gate:
            o = o * jax.nn.silu(self.g_proj(x)).reshape(o.shape)
        y = self.o_proj(o.reshape(*x.shape[:2], -1))
        if segment_ids is not None:
            segment_id = segment_ids[:, -1].astype(jnp.int32)
        else:
            segment_id = jnp.zeros((x.shape[0],), jnp.int32) if cache is None else cache.segment_id
        return y, MixerCache(tails, state, segment_id)

    def _project(
        self,
        x: Float[Array, "batch time hidden"],
        segment_ids: Int[Array, "batch time"] | None,
        cache: MixerCache | None,
    ) -> tuple[Array, Array, Array, tuple[Array, ...]]:
        """q, k and v after convolution and SiLU, split into heads, and the tails of the convolutions."""
        streams: tuple[Array, ...] = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        tails: tuple[Array, ...] = ()
        if self.use_short_conv:
            old = (None, None, None) if cache is None else cache.convolution
            convolutions = (self.q_conv, self.k_conv, self.v_conv)
            results = [f(s, segment_ids, c) for f, s, c in zip(convolutions, streams, old, strict=True)]
            streams, tails = tuple(y for y, _ in results), tuple(tail for _, tail in results)
        else:
            streams = tuple(jax.nn.silu(s) for s in streams)
        heads = (self.num_heads, self.num_heads, self.num_v_heads)
        q, k, v = (s.reshape(*s.shape[:2], n, -1) for s, n in zip(streams, heads, strict=True))
        return q, k, v, tails

    def _apply_rule(
        self, inputs: RuleInputs, segment_ids: Int[Array, "batch time"] | None, cache: MixerCache | None
    ) -> tuple[Float[Array, "batch time v_heads value"], Float[Array, "batch v_heads key value"]]:
        implementation = self.implementation
        if implementation is None and indivisible(inputs.q.shape[0], self.num_heads):
            implementation = "xla"
        if cache is not None and inputs.q.shape[1] == 1:
            rule: Callable[..., tuple[Array, Array]] = partial(_one_token, implementation=implementation)
        else:
            rule = partial(_whole, chunk_size=self.chunk_size, implementation=implementation)
        if implementation in (None, "pallas"):  # XLA cuts over a mesh what it made itself, but not a kernel
            rule = partial(by_heads, rule)
        return rule(inputs, None if cache is None else cache.state, segment_ids)


def _whole(inputs: RuleInputs, state: Array | None, segment_ids: Array | None, **options: Any) -> tuple[Array, Array]:
    return delta_rule(*inputs, initial_state=state, segment_ids=segment_ids, **options)


def _one_token(inputs: RuleInputs, state: Array, segment_ids: Array | None, **options: Any) -> tuple[Array, Array]:
    o, state = delta_rule_step(*jax.tree.map(lambda a: a[:, 0], inputs), state=state, **options)
    return o[:, None], state


def _require_positive_integers(**numbers: int | None) -> None:
    for name, number in numbers.items():
        if number is not None and (not isinstance(number, int) or isinstance(number, bool) or number < 1):
            raise ValueError(f"{name} must be a positive integer, got {number!r}")
