"""What every member of the family shares: projections, short convolution, output and cache.

    q, k, v = silu(conv(x W_q)), silu(conv(x W_k)), silu(conv(x W_v))
    o       = op(member's choice of q, k, v, beta, g, erase)
    y       = (rmsnorm(o) * silu(x W_g)) W_o                        the gate only with use_output_gate

A member is a subclass that adds its own parameters and says in `rule_inputs` how the inputs of the op come
from x. Its op is the delta rule unless it names another.
"""

import math
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from delta_jax.layers.checks import require_rngs
from delta_jax.layers.contained import contained, finite_tokens, select_finite
from delta_jax.layers.convolution import ShortConvolution, convolved, of_prologue
from delta_jax.layers.fused import gated_norm
from delta_jax.layers.low_rank import LowRank
from delta_jax.layers.mixer_cache import MixerCache, OfLayer
from delta_jax.layers.norm import RMSNorm, l2_normalize
from delta_jax.layers.options import ACTIVATIONS, GATE_ACTIVATIONS, MixerOptions, MixerSettings
from delta_jax.layers.rule import Rule, RuleInputs, apply_rule
from delta_jax.layers.token_mixer import Mixed, TokenMixer
from delta_jax.ops import delta_rule, delta_rule_step
from delta_jax.ops.arguments import require_count
from delta_jax.ops.attention import rotate
from delta_jax.ops.padding import at_last, filled_ids, first_tokens, select_tokens, skip_tokens
from delta_jax.ops.segments import positions
from delta_jax.parallel import cut_batch

__all__ = ["Mixer", "MixerCache", "MixerOptions", "MixerSettings", "Rule", "RuleInputs"]


class Mixer(TokenMixer):
    """A token mixer built on the delta rule or on linear attention; subclasses choose the inputs of the op.

    Args:
        settings: its options.
        rngs: where the initial parameters come from.

    Attributes:
        rule: the op, and one token of it.
        scale: of the op.
        rope_theta: base of a rotary embedding of q and k; None is none.
        unit_qk: whether every head of q and k is divided by its length, before a rotary embedding.
        weighs_streams: whether `rule_inputs` makes products of q, k or v with what depends on parameters, whose gradients a
            token of them that is not finite would reach; then it sees zeros in place of such a token. True for every class
            that has a `rule_inputs` of its own and does not say otherwise.

    Examples:
        >>> layer = DeltaNet(16, num_heads=2, rngs=nnx.Rngs(0))
        >>> isinstance(layer, Mixer), layer.rule.whole.__name__
        (True, 'delta_rule')
    """

    rule: ClassVar[Rule] = Rule(delta_rule, delta_rule_step)
    scale: ClassVar[float | None] = None
    rope_theta: ClassVar[float | None] = None
    unit_qk: bool = False
    weighs_streams: ClassVar[bool] = True

    def __init_subclass__(cls, **options: Any):
        super().__init_subclass__(**options)
        if "rule_inputs" in vars(cls) and "weighs_streams" not in vars(cls):
            cls.weighs_streams = True

    def __init__(self, settings: MixerSettings, *, rngs: nnx.Rngs):
        require_rngs(rngs)
        self.settings = settings
        self.hidden_size = settings.hidden_size
        self.num_heads, self.num_v_heads = settings.num_heads, settings.v_heads
        self.key_dim, self.value_dim = settings.key_dim, settings.value_dim
        self.use_output_gate = settings.use_output_gate
        self.initializer_std = settings.initializer_std
        self.dtype, self.param_dtype = jnp.dtype(settings.dtype), jnp.dtype(settings.param_dtype)

        hidden, output = settings.hidden_size, self.num_v_heads * self.value_dim
        self.q_proj, self.k_proj, self.v_proj = (self.linear(hidden, n, rngs) for n in settings.stream_sizes)
        if settings.use_short_conv:
            activations = settings.qk_activation, settings.qk_activation, "silu"
            self.q_conv, self.k_conv, self.v_conv = (
                ShortConvolution(self, settings.conv_size, n, rngs, use_bias=settings.conv_bias, activation=activation)
                for n, activation in zip(settings.stream_sizes, activations, strict=True)
            )
        if settings.use_output_gate:
            if settings.output_gate_low_rank:
                bias = settings.output_gate_bias
                self.g_proj: nnx.Module = LowRank(self, hidden, self.value_dim, output, rngs, use_bias=bias)
            else:
                self.g_proj = self.linear(hidden, output, rngs)
        if settings.use_output_norm:
            self.o_norm = RMSNorm(self.value_dim, eps=settings.eps, param_dtype=settings.param_dtype)
        self.o_proj = self.linear(output, hidden, rngs)

    def activation(self, stream: Float[Array, "batch time channels"]) -> Float[Array, "batch time channels"]:
        """What follows the projections where there is no short convolution; with one it is SiLU, or qk_activation."""
        return jax.nn.silu(stream)

    def rule_inputs(
        self,
        x: Float[Array, "batch time hidden"],
        q: Float[Array, "batch time heads key"],
        k: Float[Array, "batch time *writes heads key"],
        v: Float[Array, "batch time *writes v_heads value"],
    ) -> RuleInputs:
        """The inputs of the op: what makes one member differ from another; q and k are normalised only with `unit_qk`."""
        raise NotImplementedError

    def write_strength(self, logits: Float[Array, "*leading"]) -> Float[Array, "*leading"]:
        """`sigmoid(logits)` in float32, or twice that with allow_negative_eigenvalues."""
        beta = jax.nn.sigmoid(logits.astype(jnp.float32))
        return 2.0 * beta if self.settings.allow_negative_eigenvalues else beta

    def output(
        self,
        x: Float[Array, "batch time hidden"],
        v: Float[Array, "batch time *writes v_heads value"],
        o: Float[Array, "batch time v_heads value"],
    ) -> Float[Array, "batch time channels"]:
        """The op's output o, normalised and gated; for a layer in float16 v and o are float32.

        Of a token that is not finite in o the result has to be finite; it does not count.
        """
        gate = self.g_proj(x) if self.use_output_gate else None
        activation = self.settings.output_gate_activation
        if self.settings.use_output_norm:
            return gated_norm(self.o_norm, o, gate, activation, self.settings.implementation).astype(self.dtype)
        o = select_finite(finite_tokens(o), o, 0.0).reshape(*x.shape[:2], -1).astype(self.dtype)
        return o if gate is None else o * GATE_ACTIVATIONS[activation](gate)

    def init_cache(self, batch_size: int, *, length: int | None = None) -> MixerCache:
        """The cache of `batch_size` sequences that have not begun; its size does not depend on their length."""
        require_count("batch_size", batch_size)
        if length is not None:
            require_count("length", length)
        tail = self.settings.conv_size - 1
        sizes = self.settings.stream_sizes if self.settings.use_short_conv else ()
        return MixerCache(
            tuple(jnp.zeros((batch_size, tail, size), self.dtype) for size in sizes),
            jnp.zeros((batch_size, self.num_v_heads, self.key_dim, self.value_dim), jnp.float32),
            jnp.zeros((batch_size,), jnp.int32),
            jnp.zeros((batch_size,), jnp.int32),
        )

    def cache_of_layer(self, caches: Any, layer: Int[Array, ""]) -> Any:
        small = caches._replace(convolution=(), state=())
        mine = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False), small)
        tails = tuple(OfLayer(tail, layer) for tail in caches.convolution)
        return mine._replace(convolution=tails, state=OfLayer(caches.state, layer))

    def with_cache_of_layer(self, caches: Any, layer: Int[Array, ""], cache: Any) -> Any:
        old, new = (x._replace(convolution=(), state=()) for x in (caches, cache))
        tails = tuple(tail.stack for tail in cache.convolution)
        whole = super().with_cache_of_layer(old, layer, new)
        return whole._replace(convolution=tails, state=cache.state.stack)

    def with_cache(
        self,
        x: Float[Array, "batch time hidden"],
        segment_ids: Int[Array, "batch time"] | None,
        cache: MixerCache | None,
        lengths: Int[Array, " batch"] | None = None,
    ) -> Mixed:
        """What calling the layer with return_cache=True does; of each row only the first `lengths` tokens are there."""
        x = x.astype(self.dtype)
        old = self.init_cache(x.shape[0]) if cache is None else cache
        real = None if lengths is None else first_tokens(lengths, x.shape[1])
        if real is not None:
            x = select_tokens(real, x)
        if segment_ids is None:
            ids = jnp.broadcast_to(old.segment_id[:, None], x.shape[:2])
        else:
            segment_ids = ids = filled_ids(segment_ids, lengths, old.segment_id)
            old = old.keep(ids[:, 0] == old.segment_id)
        position = positions(ids, old.position).position
        # Selected once for all uses of x: on a mesh every selection is an exchange of its own on the way back.
        finite = finite_tokens(x)
        x = cut_batch(select_finite(finite, x, 0.0))
        q, k, v, tails = self._project(x, finite, segment_ids, old, lengths)
        if self.rope_theta is not None:
            q, k = (rotate(y, position, theta=self.rope_theta, channels=self.key_dim) for y in (q, k))
        inputs_of = partial(self.rule_inputs, x)
        inputs = contained(inputs_of, q, k, v) if self.weighs_streams else inputs_of(q, k, v)
        if real is not None:
            inputs = RuleInputs(**skip_tokens(real, **inputs._asdict()))
        o, state = apply_rule(
            self.rule,
            inputs,
            None if cache is None else old.state,
            segment_ids,
            scale=self.scale,
            chunk_size=self.settings.chunk_size,
            implementation=self.settings.implementation,
        )

        y: Array = select_finite(finite_tokens(o), self.o_proj(self.output(x, v, o)), jnp.nan)
        if real is not None:
            y = select_tokens(real, y)
        last = at_last(lengths, position, old.position - 1) + 1
        return Mixed(y, MixerCache(tails, state, ids[:, -1], last))

    def _project(
        self,
        x: Float[Array, "batch time hidden"],
        finite: Bool[Array, "batch time"],
        segment_ids: Int[Array, "batch time"] | None,
        cache: MixerCache,
        lengths: Int[Array, " batch"] | None,
    ) -> tuple[Array, Array, Array, tuple[Array | OfLayer, ...]]:
        """q, k and v split into heads, after convolution, activation and norm, and the tails of the convolutions.

        Those of a layer in float16 are float32. They are NaN, from the projections on, where a token is not finite, of
        which x holds zeros.
        """
        projections = self.q_proj, self.k_proj, self.v_proj
        streams = tuple(select_finite(finite, f(x), jnp.nan) for f in projections)
        tails: tuple[Array | OfLayer, ...] = ()
        writes = () if self.settings.num_householder is None else (self.settings.num_householder,)
        implementation = self.settings.implementation
        float16 = self.dtype == jnp.float16
        at_once = self.unit_qk and self.settings.use_short_conv and not float16
        if self.settings.use_short_conv:
            convolutions = (self.q_conv, self.k_conv, self.v_conv)
            units = (self.num_heads, math.prod(writes) * self.num_heads, None) if at_once else (None, None, None)
            streams, tails = convolved(
                convolutions,
                streams,
                segment_ids,
                cache.convolution,
                lengths,
                heads=units,
                implementation=implementation,
            )
        else:
            chosen = self.settings.qk_activation
            of_qk = self.activation if chosen == "silu" else ACTIVATIONS[chosen]
            streams = tuple(f(s) for f, s in zip((of_qk, of_qk, self.activation), streams, strict=True))
        axes = (self.num_heads,), (*writes, self.num_heads), (*writes, self.num_v_heads)
        q, k, v = (s.reshape(*x.shape[:2], *heads, -1) for s, heads in zip(streams, axes, strict=True))
        if float16:  # whose largest number a sum over tokens passes before the norm brings it back
            q, k, v = (y.astype(jnp.float32) for y in (q, k, v))
        if self.unit_qk and not at_once:
            q, k = (l2_normalize(y, implementation=of_prologue(implementation)) for y in (q, k))
        return q, k, v, tails
