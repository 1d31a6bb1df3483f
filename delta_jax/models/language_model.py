"""The language model: embedding, a stack of pre-norm blocks run by one scan, norm, head."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from delta_jax.layers import MixerCache, RMSNorm, SwiGLU
from delta_jax.models.config import MixerSpec, ModelConfig
from delta_jax.parallel import cut_batch

__all__ = ["Block", "LanguageModel", "ModelCache", "number_of_parameters"]

type ModelCache = tuple[MixerCache, ...]
"""A mixer cache for every place in the pattern; its arrays carry a leading axis, the repeats of it."""


class Block(nnx.Module):
    """`x += mixer(norm(x))`, then `x += mlp(norm(x))`."""

    def __init__(self, config: ModelConfig, spec: MixerSpec, *, rngs: nnx.Rngs):
        dtype, param_dtype = jnp.dtype(config.dtype), jnp.dtype(config.param_dtype)
        self.mixer_norm = RMSNorm(config.hidden_size, eps=config.norm_eps, param_dtype=param_dtype)
        self.mixer = config.mixer(spec, rngs)
        self.mlp_norm = RMSNorm(config.hidden_size, eps=config.norm_eps, param_dtype=param_dtype)
        self.mlp = SwiGLU(
            config.hidden_size,
            config.mlp_width,
            initializer_std=config.initializer_std,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )

    def __call__(
        self,
        x: Float[Array, "batch time hidden"],
        segment_ids: Int[Array, "batch time"] | None = None,
        cache: MixerCache | None = None,
    ) -> tuple[Float[Array, "batch time hidden"], MixerCache]:
        """Returns the new residual stream and the mixer's new cache."""
        y, cache = self.mixer.with_cache(self.mixer_norm(x), segment_ids, cache)
        x = x + y
        return x + self.mlp(self.mlp_norm(x)), cache


class LanguageModel(nnx.Module):
    """A causal language model whose blocks repeat a pattern of mixers.

    The parameters of each block of the pattern are stacked along a leading axis, the repeats, and one
    `lax.scan` runs over them: compile time does not grow with depth.

    Args:
        config: what the model is made of.
        rngs: where the initial parameters come from.

    Raises:
        ValueError: a mixer's options are impossible.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
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
        keys = jax.random.split(rngs.params(), (len(config.pattern), config.repeats))
        self.blocks = nnx.List([_stacked(config, *pair) for pair in zip(config.pattern, keys, strict=True)])
        self.final_norm = RMSNorm(config.hidden_size, eps=config.norm_eps, param_dtype=param_dtype)
        if not config.tie_embeddings:
            self.lm_head = nnx.Linear(
                config.hidden_size,
                config.vocab_size,
                use_bias=False,
                kernel_init=normal,
                dtype=jnp.dtype(config.dtype),
                param_dtype=param_dtype,
                preferred_element_type=jnp.float32,
                rngs=rngs,
            )

    def init_cache(self, batch_size: int) -> ModelCache:
        """The cache of `batch_size` sequences that have not begun."""
        repeats = self.config.repeats
        caches = tuple(block.mixer.init_cache(batch_size) for block in self.blocks)
        return jax.tree.map(lambda x: jnp.zeros((repeats, *x.shape), x.dtype), caches)

    def __call__(
        self,
        tokens: Int[Array, "batch time"],
        *,
        segment_ids: Int[Array, "batch time"] | None = None,
        cache: ModelCache | None = None,
        return_cache: bool = False,
    ) -> Float[Array, "batch time vocab"] | tuple[Float[Array, "batch time vocab"], ModelCache]:
        """The logits of the token that follows each token.

        Args:
            tokens: [B, T] ids below vocab_size.
            segment_ids: [B, T] integers; nothing passes from one segment to the next. None continues the
                segment of the cache (a new cache is in segment 0).
            cache: what a former call returned, or `init_cache`; None starts anew.
            return_cache: return the new cache as well, which is always done when a cache is given.

        Returns:
            logits [B, T, vocab_size] in float32, or (logits, cache).
        """
        x, new_cache = self.features(tokens, segment_ids=segment_ids, cache=cache, return_cache=return_cache)
        logits = self.head(x)
        return logits if new_cache is None else (logits, new_cache)

    def features(
        self,
        tokens: Int[Array, "batch time"],
        *,
        segment_ids: Int[Array, "batch time"] | None = None,
        cache: ModelCache | None = None,
        return_cache: bool = False,
    ) -> tuple[Float[Array, "batch time hidden"], ModelCache | None]:
        """What the head reads, [B, T, hidden_size], and the new cache where one is given or asked for."""
        keep_cache = return_cache or cache is not None
        apply = _rematerialized(self.config.remat)

        def repeat(x: Array, stack: tuple[tuple[Block, ...], ModelCache | None]) -> tuple[Array, ModelCache | None]:
            blocks, old = stack
            new = []
            for index, block in enumerate(blocks):
                x, block_cache = apply(block, x, segment_ids, None if old is None else old[index])
                new.append(block_cache)
            return x, tuple(new) if keep_cache else None

        x, new_cache = jax.lax.scan(repeat, cut_batch(self.embed(tokens)), (tuple(self.blocks), cache))
        return self.final_norm(x), new_cache

    def head(self, x: Float[Array, "*leading hidden"]) -> Float[Array, "*leading vocab"]:
        """The float32 logits of the features x."""
        if not self.config.tie_embeddings:
            return self.lm_head(x)
        table = self.embed.embedding[...].astype(x.dtype)
        return jnp.matmul(x, table.T, preferred_element_type=jnp.float32)


def number_of_parameters(model: nnx.Module) -> int:
    """How many numbers the model learns; works on the result of `nnx.eval_shape` too."""
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def _stacked(config: ModelConfig, spec: MixerSpec, keys: Array) -> Block:
    """Independent blocks, one for every key, in one module whose parameters have a leading axis."""
    return jax.vmap(lambda key: Block(config, spec, rngs=nnx.Rngs(key)))(keys)


def _apply_block(
    block: Block, x: Array, segment_ids: Array | None, cache: MixerCache | None
) -> tuple[Array, MixerCache]:
    return block(x, segment_ids, cache)


def _rematerialized(remat: str) -> Callable[..., Any]:
    """`_apply_block` with a checkpoint policy; the scan around it makes prevent_cse needless."""
    if remat == "none":
        return _apply_block
    policies = jax.checkpoint_policies
    policy = policies.nothing_saveable if remat == "block" else policies.dots_with_no_batch_dims_saveable
    return jax.checkpoint(_apply_block, policy=policy, prevent_cse=False)
