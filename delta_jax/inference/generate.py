"""Text generation: one pass over the prompts, then one token at a time in memory that is fixed beforehand."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from delta_jax.inference.sampling import Sampling, sample
from delta_jax.models import LanguageModel, ModelCache

__all__ = ["generate"]

_PAD, _PROMPT = 0, 1


def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_id: int | None = None,
    key: PRNGKeyArray | None = None,
) -> list[list[int]]:
    """Continues every prompt.

    Prompts of different lengths share a batch: the shorter ones are padded on the left with a segment of
    their own, from which nothing passes into the prompt, so the result is that of each prompt alone.

    Args:
        model: a language model.
        prompts: token ids, at least one a prompt.
        max_new_tokens: how many tokens to add at most.
        temperature: 0 takes the likeliest token; above 0 tokens are drawn, which needs a key.
        top_k, top_p: see `Sampling`.
        stop_id: a sequence ends before this token; None never ends early.
        key: a PRNG key. Each prompt draws from its own stream, chosen by its place in the batch.

    Returns:
        the new tokens of each prompt, without the stop token.

    Raises:
        ValueError: a prompt is empty or holds an id outside the vocabulary, or an option is impossible.
    """
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    vocab_size = model.config.vocab_size
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be a positive integer, got {max_new_tokens}")
    if temperature > 0 and key is None:
        raise ValueError("key must be given when temperature is above 0")
    if stop_id is not None and not 0 <= stop_id < vocab_size:
        raise ValueError(f"stop_id must lie in [0, {vocab_size}), got {stop_id}")
    tokens, segment_ids = _left_pad(prompts, vocab_size)
    logits, cache = _prefill(model, tokens, segment_ids, tokens.shape[1] + max_new_tokens)
    keys = None if key is None else jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(len(prompts)))
    new = _decode(model, logits, cache, keys, sampling, max_new_tokens, stop_id)
    return [_before(row, stop_id) for row in np.asarray(new).tolist()]


def _left_pad(
    prompts: Sequence[Sequence[int]], vocab_size: int
) -> tuple[Int[Array, "batch time"], Int[Array, "batch time"]]:
    """Tokens and segment ids; the length is a power of two, so that few shapes are ever compiled."""
    if len(prompts) == 0:
        raise ValueError("prompts must hold at least one prompt")
    for place, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"prompt {place} is empty; a prompt needs at least one token")
        if not all(0 <= token < vocab_size for token in prompt):
            raise ValueError(f"prompt {place} holds a token outside [0, {vocab_size})")
    length = max(8, 1 << (max(map(len, prompts)) - 1).bit_length())
    tokens = np.zeros((len(prompts), length), np.int32)
    segment_ids = np.full((len(prompts), length), _PAD, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, length - len(prompt) :] = prompt
        segment_ids[row, length - len(prompt) :] = _PROMPT
    return jnp.asarray(tokens), jnp.asarray(segment_ids)


@partial(jax.jit, static_argnames="length")
def _prefill(
    model: LanguageModel, tokens: Int[Array, "batch time"], segment_ids: Int[Array, "batch time"], length: int
) -> tuple[Float[Array, "batch vocab"], ModelCache]:
    """The logits after the last token of every prompt, and the cache there, with room for `length` tokens."""
    features, cache = model.features(tokens, segment_ids=segment_ids, return_cache=True)
    assert cache is not None
    return model.head(features[:, -1]), model.extend_cache(cache, length)


@partial(jax.jit, static_argnames=("sampling", "max_new_tokens", "stop_id"))
def _decode(
    model: LanguageModel,
    logits: Float[Array, "batch vocab"],
    cache: ModelCache,
    keys: PRNGKeyArray | None,
    sampling: Sampling,
    max_new_tokens: int,
    stop_id: int | None,
) -> Int[Array, "batch new"]:
    """Draws tokens until every row has stopped or is full."""
    batch = logits.shape[0]

    def unfinished(carry: tuple) -> Array:
        step, _, _, stopped, _ = carry
        return (step < max_new_tokens) & ~jnp.all(stopped)

    def draw(carry: tuple) -> tuple:
        step, logits, cache, stopped, new = carry
        step_keys = None if keys is None else jax.vmap(jax.random.fold_in, (0, None))(keys, step)
        token = sample(logits, sampling, step_keys)
        new = jax.lax.dynamic_update_slice(new, token[:, None], (jnp.zeros((), step.dtype), step))
        if stop_id is not None:
            stopped = stopped | (token == stop_id)
        features, cache = model.features(token[:, None], cache=cache)
        return step + 1, model.head(features[:, 0]), cache, stopped, new

    new = jnp.zeros((batch, max_new_tokens), jnp.int32)
    start = (jnp.zeros((), jnp.int32), logits, cache, jnp.zeros((batch,), bool), new)
    return jax.lax.while_loop(unfinished, draw, start)[-1]


def _before(tokens: list[int], stop_id: int | None) -> list[int]:
    return tokens[: tokens.index(stop_id)] if stop_id in tokens else tokens
