"""The language model: embedding, a stack of blocks run by one scan, norm, head."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from delta_jax.layers import AttentionCache, ExpertBias, MixerCache, MixtureOfExperts, RMSNorm, SwiGLU
from delta_jax.layers.checks import require_cache, require_positive_integers, require_rngs
from delta_jax.layers.contained import contained
from delta_jax.layers.projection import embedded, project
from delta_jax.models.config import Layer, ModelConfig
from delta_jax.models.stack import Run
from delta_jax.ops.arguments import as_array, checked_array
from delta_jax.ops.implementations import FEW_TOKENS
from delta_jax.ops.padding import first_tokens, select_tokens, to_front
from delta_jax.parallel import by_compiler, cut_batch, spec_of

__all__ = ["Block", "LanguageModel", "Loads", "ModelCache", "number_of_parameters"]

type LayerCache = MixerCache | AttentionCache
type ModelCache = tuple[LayerCache, ...]
"""The caches of `LanguageModel.blocks`; their arrays carry a leading axis, the repeats of each block."""

type Loads = tuple[Int[Array, "repeats experts"] | None, ...]
"""How many tokens every expert got, for each of `LanguageModel.blocks`; None where there are no experts."""


class BlockOutput(NamedTuple):
    """The new residual stream, the mixer's new cache and the load of the experts, if there are any."""

    x: Float[Array, "batch time hidden"]
    cache: LayerCache
    load: Int[Array, " experts"] | None


class Block(nnx.Module):
    """`x += mixer(norm(x))`, then `x += mlp(norm(x))` where there is one; "post" is `norm(mixer(x))` and `norm(mlp(x))`."""

    def __init__(self, config: ModelConfig, layer: Layer, *, rngs: nnx.Rngs):
        self.norms_first = layer.mixer.norm_placement == "pre"
        self.mixer_norm = _norm(config)
        self.mixer = config.mixer(layer.mixer, rngs)
        self.mlp = _feed_forward(config, layer, rngs)
        if self.mlp is not None:
            self.mlp_norm = _norm(config)

    def __call__(
        self,
        x: Float[Array, "batch time hidden"],
        segment_ids: Int[Array, "batch time"] | None = None,
        cache: LayerCache | None = None,
        lengths: Int[Array, " batch"] | None = None,
        counted: Bool[Array, "batch time"] | None = None,
    ) -> BlockOutput:
        """Adds what the mixer and the feed-forward layer say to the residual stream.

        Of each row only the first `lengths` tokens are there; `counted` says which tokens count in the load.
        """
        first = self.norms_first
        read = cut_batch(self.mixer_norm(x) if first else x)
        y, cache = self.mixer.with_cache(read, segment_ids=segment_ids, cache=cache, lengths=lengths)
        y = y if first else self.mixer_norm(y)
        x, load = x + checkpoint_name(cut_batch(y), "mixer_output"), None
        if self.mlp is None:
            return BlockOutput(x, cache, None)
        read = self.mlp_norm(x) if first else x
        if isinstance(self.mlp, SwiGLU):
            y = self.mlp(cut_batch(read))
        else:
            y, load = self.mlp(read, counted)
        return BlockOutput(x + cut_batch(y if first else self.mlp_norm(y)), cache, load)


class LanguageModel(nnx.Module):
    """A causal language model whose blocks repeat a pattern of mixers.

    `config.runs` says what repeats. The parameters of each block of a run are stacked along a leading axis, the
    repeats, and one `lax.scan` runs over them: compile time does not grow with depth. `blocks` holds the stacks of
    all runs, in order.

    Args:
        config: what the model is made of.
        rngs: where the initial parameters come from.

    Raises:
        ValueError: config is no `ModelConfig`, rngs are no `nnx.Rngs`, or a mixer's options are impossible.

    Examples:
        >>> mixer = MixerSpec(mixer="delta_net", options=(("num_heads", 2),))
        >>> config = ModelConfig(vocab_size=11, hidden_size=8, num_layers=2, pattern=(mixer,), intermediate_size=8)
        >>> model = LanguageModel(config, rngs=nnx.Rngs(0))
        >>> model(jnp.array([[1, 2, 3]])).shape
        (1, 3, 11)
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        if not isinstance(config, ModelConfig):
            raise ValueError(f"config must be a ModelConfig, got {type(config).__name__}")
        require_rngs(rngs)
        self.config = config
        param_dtype = jnp.dtype(config.param_dtype)
        normal = nnx.initializers.normal(config.initializer_std)
        self.embed = nnx.Embed(
            config.vocab_size,
            config.hidden_size,
            dtype=jnp.dtype(config.dtype),
            param_dtype=param_dtype,
            embedding_init=normal,
            rngs=rngs,
        )
        self.blocks = nnx.List([stack for run in config.runs for stack in _stacks(config, run, rngs.params())])
        self.final_norm = _norm(config)
        if not config.tie_embeddings:
            self.lm_head = nnx.Linear(
                config.hidden_size,
                config.vocab_size,
                use_bias=False,
                kernel_init=normal,
                dtype=jnp.dtype(config.dtype),
                param_dtype=param_dtype,
                preferred_element_type=jnp.float32,
                dot_general=project,
                rngs=rngs,
            )

    def init_cache(self, batch_size: int, *, length: int | None = None) -> ModelCache:
        """The cache of `batch_size` sequences that have not begun.

        Args:
            batch_size: sequences.
            length: tokens that a sequence may have at most; needed where there is attention without a window.

        Raises:
            ValueError: batch_size is not a positive integer, or length is needed and missing.
        """
        caches = tuple(block.mixer.init_cache(batch_size, length=length) for block in self.blocks)
        repeats = tuple(run.repeats for run in self.config.runs for _ in run.block)
        return tuple(
            jax.tree.map(lambda x, count=count: jnp.zeros((count, *x.shape), x.dtype), cache)
            for count, cache in zip(repeats, caches, strict=True)
        )

    def extend_cache(self, cache: ModelCache, length: int) -> ModelCache:
        """The cache with room for segments of `length` tokens.

        Raises:
            ValueError: length is not a positive integer, or the cache has room for more already.
        """
        require_positive_integers(length=length)
        wanted = jax.eval_shape(lambda: self.init_cache(cache[0].segment_id.shape[1], length=length))

        def extend(x: Array, like: jax.ShapeDtypeStruct) -> Array:
            if x.shape == like.shape:
                return x
            more = [(0, new - old) for old, new in zip(x.shape, like.shape, strict=True)]
            if min(more) < (0, 0):
                raise ValueError(f"length must not be less than the room there is, {x.shape[2]} tokens, got {length}")
            return jnp.pad(x, more)

        return jax.tree.map(extend, cache, wanted)

    def __call__(
        self,
        tokens: Int[Array, "batch time"],
        *,
        segment_ids: Int[Array, "batch time"] | None = None,
        mask: Bool[Array, "batch time"] | None = None,
        cache: ModelCache | None = None,
        return_cache: bool = False,
    ) -> Float[Array, "batch time vocab"] | tuple[Float[Array, "batch time vocab"], ModelCache]:
        """The logits of the token that follows each token.

        Args:
            tokens: [B, T] ids below vocab_size.
            segment_ids: [B, T] integers; nothing passes from one segment to the next. None continues the
                segment of the cache (a new cache is in segment 0).
            mask: [B, T] bool, false where a token is padding, on either side or between; None is none. Logits of real
                tokens and the new cache are those of the rows without padding, whatever ids it holds; its own logits
                are zero, and experts do not count it. A row of padding alone leaves its cache as it is.
            cache: what a former call returned, or `init_cache`; None starts anew.
            return_cache: return the new cache as well, which is always done when a cache is given. Attention without
                a window, if no cache is given, has room for these T tokens; `extend_cache` makes more.

        Returns:
            logits [B, T, vocab_size] in float32, or (logits, cache).

        Raises:
            ValueError: tokens, segment_ids or mask do not have that shape or kind, the cache is another model's or one of
                another batch size, or it is known to be too small for the tokens (inside `jit` it is not known, and
                logits beyond are NaN).
        """
        x, new_cache = self.features(tokens, segment_ids=segment_ids, mask=mask, cache=cache, return_cache=return_cache)
        logits = self.head(x)
        return logits if new_cache is None else (logits, new_cache)

    def features(
        self,
        tokens: Int[Array, "batch time"] | Float[Array, "batch time first"],
        *,
        segment_ids: Int[Array, "batch time"] | None = None,
        mask: Bool[Array, "batch time"] | None = None,
        cache: ModelCache | None = None,
        return_cache: bool = False,
    ) -> tuple[Float[Array, "batch time hidden"], ModelCache | None]:
        """What the head reads, [B, T, hidden_size], and the new cache where one is given or asked for.

        Tokens may be weights [B, T, n] over the first n tokens, for inputs that are not certain: the embeddings are
        summed with them.
        """
        x, new_cache, _ = self.features_and_loads(
            tokens, segment_ids=segment_ids, mask=mask, cache=cache, return_cache=return_cache
        )
        return x, new_cache

    def features_and_loads(
        self,
        tokens: Int[Array, "batch time"] | Float[Array, "batch time first"],
        *,
        segment_ids: Int[Array, "batch time"] | None = None,
        mask: Bool[Array, "batch time"] | None = None,
        counted: Bool[Array, "batch time"] | None = None,
        cache: ModelCache | None = None,
        return_cache: bool = False,
    ) -> tuple[Float[Array, "batch time hidden"], ModelCache | None, Loads]:
        """`features`, and how many tokens every expert got: real ones, and, if `counted` [B, T] is given, only its."""
        tokens, segment_ids = self._checked(tokens, segment_ids)
        if cache is not None:
            require_cache(cache, tokens.shape[0], self.init_cache)
        cut = spec_of(tokens)
        results = PartitionSpec(*cut[:2], None), PartitionSpec(None, cut[0]), PartitionSpec()
        run = partial(LanguageModel._features_and_loads, return_cache=return_cache)
        return by_compiler(run, (self, tokens, segment_ids, mask, counted, cache), results)

    def _features_and_loads(
        self,
        tokens: Array,
        segment_ids: Array | None,
        mask: Array | None,
        counted: Array | None,
        cache: ModelCache | None,
        *,
        return_cache: bool,
    ) -> tuple[Array, ModelCache | None, Loads]:
        front = None if mask is None else to_front(mask, tokens.shape[:2])
        lengths = None if front is None else front.lengths
        if front is not None:
            tokens, counted = front.move(tokens), front.move(front.mask if counted is None else front.mask & counted)
            segment_ids = None if segment_ids is None else front.move(segment_ids)
        keep_cache = return_cache or cache is not None
        apply = _rematerialized(self.config)
        if cache is not None and segment_ids is None:
            for block, block_cache in zip(self.blocks, cache, strict=True):
                block.mixer.check_room(cache=block_cache, tokens=tokens.shape[1] if lengths is None else lengths)

        def through(x: Array, blocks: tuple[Block, ...], old: ModelCache | None) -> tuple[Array, ModelCache, tuple]:
            new, loads = [], []
            for block, before in zip(blocks, old or (None,) * len(blocks), strict=True):
                x, block_cache, load = apply(block, x, segment_ids, before, lengths, counted)
                new.append(block_cache)
                loads.append(load)
            return x, tuple(new), tuple(loads)

        def repeat(x: Array, stack: tuple[tuple[Block, ...], ModelCache | None]) -> tuple[Array, tuple]:
            x, new, loads = through(x, *stack)
            return x, (new if keep_cache else (), loads)

        def repeat_in_place(carry: tuple[Array, ModelCache, Array], blocks: tuple[Block, ...]) -> tuple[tuple, tuple]:
            """For a few tokens: caches that the scan takes apart and puts together again would be copied twice."""
            x, caches, layer = carry
            old = tuple(b.mixer.cache_of_layer(c, layer) for b, c in zip(blocks, caches, strict=True))
            x, new, loads = through(x, blocks, old)
            put = zip(blocks, caches, new, strict=True)
            return (x, tuple(b.mixer.with_cache_of_layer(c, layer, n) for b, c, n in put), layer + 1), loads

        x = self._embedded(tokens)
        if lengths is not None:
            x = select_tokens(first_tokens(lengths, x.shape[1]), x)
        x, place = cut_batch(x), 0
        few = isinstance(x.shape[1], int) and x.shape[1] <= FEW_TOKENS
        new_cache: ModelCache = ()
        loads: Loads = ()
        for run in self.config.runs:
            here = slice(place, place + len(run.block))
            blocks, old = tuple(self.blocks[here]), None if cache is None else cache[here]
            if old is not None and segment_ids is None and few:
                carry = x, old, jnp.zeros((), jnp.int32)
                (x, run_cache, _), run_loads = jax.lax.scan(repeat_in_place, carry, blocks)
            else:
                x, (run_cache, run_loads) = jax.lax.scan(repeat, x, (blocks, old))
            new_cache, loads, place = new_cache + run_cache, loads + run_loads, here.stop
        x = self.final_norm(x)
        return x if front is None else front.back(x), new_cache if keep_cache else None, loads

    def _checked(self, tokens: Any, segment_ids: Any) -> tuple[Array, Array | None]:
        """Tokens and segment ids as arrays, or a ValueError that names one that does not fit."""
        tokens, vocabulary = as_array("tokens", tokens), self.config.vocab_size
        ids = tokens.ndim == 2 and jnp.issubdtype(tokens.dtype, jnp.integer)
        weights = tokens.ndim == 3 and jnp.issubdtype(tokens.dtype, jnp.floating) and tokens.shape[2] <= vocabulary
        if not ids and not weights:
            raise ValueError(
                f"tokens must be integers [batch, time], or weights [batch, time, n] over the first n of {vocabulary}"
                f" tokens, got shape {tokens.shape} and dtype {tokens.dtype}."
            )
        if 0 in tokens.shape:
            raise ValueError(f"tokens must hold at least one token, got shape {tokens.shape}.")
        if segment_ids is None:
            return tokens, None
        axes = dict(zip(("batch", "time"), tokens.shape[:2], strict=True))
        return tokens, checked_array("segment_ids", segment_ids, axes, "integers")

    def _embedded(self, tokens: Array) -> Array:
        if jnp.issubdtype(tokens.dtype, jnp.integer):
            return embedded(self.embed, tokens)
        return tokens.astype(self.embed.dtype) @ self.embed.embedding[: tokens.shape[-1]].astype(self.embed.dtype)

    def head(self, x: Float[Array, "*leading hidden"]) -> Float[Array, "*leading vocab"]:
        """The float32 logits of the features x."""
        x = checked_array("x", x, {"...": None, "hidden_size": self.config.hidden_size})
        logits: Array = by_compiler(LanguageModel._head, (self, x), PartitionSpec(*spec_of(x)[:-1], None))
        return logits

    def _head(self, x: Array) -> Array:
        return contained(self._logits, x, tokens=x.ndim - 1)

    def _logits(self, x: Array) -> Array:
        if not self.config.tie_embeddings:
            return self.lm_head(x)
        table = self.embed.embedding[...].astype(x.dtype)
        return jnp.matmul(x, table.T, preferred_element_type=jnp.float32)


def number_of_parameters(model: nnx.Module) -> int:
    """How many numbers the model learns by gradients; works on the result of `nnx.eval_shape` too.

    Examples:
        >>> number_of_parameters(nnx.Linear(3, 4, rngs=nnx.Rngs(0)))
        16
    """
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.All(nnx.Param, nnx.Not(ExpertBias)))))


def _norm(config: ModelConfig) -> RMSNorm:
    return RMSNorm(
        config.hidden_size,
        eps=config.norm_eps,
        zero_centered=config.zero_centered_norms,
        param_dtype=jnp.dtype(config.param_dtype),
    )


def _feed_forward(config: ModelConfig, layer: Layer, rngs: nnx.Rngs) -> MixtureOfExperts | SwiGLU | None:
    if layer.experts:
        return config.expert_layer(rngs)
    if not config.mlp_width:
        return None
    return SwiGLU(
        config.hidden_size,
        config.mlp_width,
        initializer_std=config.initializer_std,
        dtype=jnp.dtype(config.dtype),
        param_dtype=jnp.dtype(config.param_dtype),
        rngs=rngs,
    )


def _stacks(config: ModelConfig, run: Run, key: PRNGKeyArray) -> list[Block]:
    """The blocks of a run: independent ones for all its repeats in one module, whose parameters have a leading axis."""
    keys = jax.random.split(key, (len(run.block), run.repeats))
    return [
        jax.vmap(lambda key, layer=layer: Block(config, layer, rngs=nnx.Rngs(key)))(row)
        for layer, row in zip(run.block, keys, strict=True)
    ]


def _apply_block(
    block: Block,
    x: Array,
    segment_ids: Array | None,
    cache: LayerCache | None,
    lengths: Array | None,
    counted: Array | None,
) -> BlockOutput:
    return block(x, segment_ids=segment_ids, cache=cache, lengths=lengths, counted=counted)


def _rematerialized(config: ModelConfig) -> Callable[..., Any]:
    """`_apply_block` with a checkpoint policy; the scan around it makes prevent_cse needless."""
    if config.remat == "none":
        return _apply_block
    policies = jax.checkpoint_policies
    policy = policies.save_and_offload_only_these_names(
        names_which_can_be_saved=config.remat_save,
        names_which_can_be_offloaded=config.remat_offload,
        offload_src="device",
        offload_dst="pinned_host",
    )

    def or_products(*operation: Any, **options: Any) -> Any:
        return policies.dots_with_no_batch_dims_saveable(*operation, **options) or policy(*operation, **options)

    return jax.checkpoint(_apply_block, policy=or_products if config.remat == "dots" else policy, prevent_cse=False)
