"""Text generation: one pass over the prompts, then one token at a time in memory that is fixed beforehand."""

import itertools
import operator
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from delta_jax.inference.sampling import Sampling, SamplingNumbers, draw
from delta_jax.layers.checks import require_positive_integers
from delta_jax.models import LanguageModel, ModelCache

__all__ = ["generate"]

type Prompt = Sequence[int] | Int[np.ndarray, " _"]

_PAD, _PROMPT = 0, 1
_BLOCK = 64  # tokens that one call of the compiled loop adds at most


def generate(
    model: LanguageModel,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_id: int | Sequence[int] | None = None,
    key: PRNGKeyArray | None = None,
) -> list[list[int]]:
    """Continues every prompt.

    Prompts of different lengths share a batch: the shorter ones are padded on the left with a segment of
    their own, from which nothing passes into the prompt, so the result is that of each prompt alone.

    What is compiled depends on the model, on how many prompts there are and, for the pass over the prompts, on the next
    power of two of the longest one's length (at least 8). Where attention keeps every token, its cache grows by powers of
    two, and the loop is compiled for each. No other argument is static, and none changes the tokens before the place
    where it first matters: a larger max_new_tokens gives the same tokens bit for bit and then more.

    Args:
        model: a language model.
        prompts: token ids, at least one a prompt.
        max_new_tokens: how many tokens to add at most.
        temperature: 0 takes the likeliest token; above 0 tokens are drawn, which needs a key.
        top_k, top_p: see `Sampling`.
        stop_id: a sequence ends before this token, or before the first of several; None never ends early.
        key: a PRNG key. Each prompt draws from its own stream, chosen by its place in the batch.

    Returns:
        the new tokens of each prompt, without the stop token.

    Raises:
        ValueError: a prompt is empty or holds an id outside the vocabulary, or an option is impossible.

    Examples:
        >>> mixer = MixerSpec(mixer="delta_net", options=(("num_heads", 2),))
        >>> config = ModelConfig(vocab_size=11, hidden_size=8, num_layers=1, pattern=(mixer,), intermediate_size=0)
        >>> model = LanguageModel(config, rngs=nnx.Rngs(0))
        >>> new = generate(model, [[1, 2, 3], [4]], max_new_tokens=2)
        >>> [len(tokens) for tokens in new]
        [2, 2]
    """
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    vocab_size = model.config.vocab_size
    require_positive_integers(max_new_tokens=max_new_tokens)
    if temperature > 0 and key is None:
        raise ValueError("key must be given when temperature is above 0")
    stops = _stops(stop_id, vocab_size)
    tokens, segment_ids = _left_pad(prompts, vocab_size)
    numbers, stop = sampling.numbers(), jnp.asarray(stops)
    key = jax.random.key(0) if key is None else key  # not used, but it spares a second program
    longest, room = max(map(len, prompts)), _room(tokens.shape[1] + _BLOCK)
    logits, cache = _prefill(model, tokens, segment_ids, room)
    stopped = jnp.zeros((len(prompts),), bool)
    blocks = []
    for start in itertools.count(0, _BLOCK):
        count = min(_BLOCK, max_new_tokens - start)
        if count <= 0 or bool(stopped.all()):
            break
        if longest + start + _BLOCK > room:
            room = _room(longest + start + _BLOCK)
            cache = model.extend_cache(cache, room)
        where = jnp.asarray((start, count), jnp.int32)
        logits, cache, stopped, block = _decode(model, logits, cache, stopped, key, numbers, stop, where)
        blocks.append(np.asarray(block)[:, :count])
    return [_before(row, stops) for row in np.concatenate(blocks, axis=1)]


def _stops(stop_id: int | Sequence[int] | None, vocab_size: int) -> Bool[np.ndarray, " vocab"]:
    """Which tokens end a sequence."""
    ids = () if stop_id is None else np.atleast_1d(np.asarray(stop_id, object))
    stops = np.zeros((vocab_size,), bool)
    for token in ids:
        if not _is_id(token) or not 0 <= token < vocab_size:
            raise ValueError(f"stop_id must lie in [0, {vocab_size}), got {token!r}")
        stops[token] = True
    return stops


def _left_pad(prompts: Sequence[Prompt], vocab_size: int) -> tuple[Int[Array, "batch time"], Int[Array, "batch time"]]:
    """Tokens and segment ids; the length is a power of two, so that few shapes are ever compiled."""
    if not _is_sequence(prompts) or len(prompts) == 0:
        raise ValueError(f"prompts must hold at least one prompt, got {prompts!r}")
    for index, prompt in enumerate(prompts):
        if not _is_sequence(prompt) or not all(map(_is_id, prompt)):
            raise ValueError(f"prompt {index} must be a sequence of token ids, which are integers, got {prompt!r}")
        if len(prompt) == 0:
            raise ValueError(f"prompt {index} is empty; a prompt needs at least one token")
        if not all(0 <= token < vocab_size for token in prompt):
            raise ValueError(f"prompt {index} holds a token outside [0, {vocab_size})")
    length = max(8, _power_of_two(max(map(len, prompts))))
    tokens = np.zeros((len(prompts), length), np.int32)
    segment_ids = np.full((len(prompts), length), _PAD, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, length - len(prompt) :] = prompt
        segment_ids[row, length - len(prompt) :] = _PROMPT
    return jnp.asarray(tokens), jnp.asarray(segment_ids)


def _is_sequence(x: object) -> bool:
    return (isinstance(x, Sequence) and not isinstance(x, str | bytes)) or bool(getattr(x, "ndim", 0))


def _is_id(x: object) -> bool:
    """Whether it is an integer, of Python, NumPy or JAX; True is none."""
    try:
        operator.index(x)  # type: ignore[arg-type]
    except TypeError:
        return False
    return not isinstance(x, bool)


def _power_of_two(number: int) -> int:
    """The next one that is not less."""
    return 1 << (number - 1).bit_length()


def _room(tokens: int) -> int:
    """For how many tokens caches that keep them all are made, so that few sizes are ever compiled."""
    return max(256, _power_of_two(tokens))


@partial(jax.jit, static_argnames="room")
def _prefill(
    model: LanguageModel, tokens: Int[Array, "batch time"], segment_ids: Int[Array, "batch time"], room: int
) -> tuple[Float[Array, "batch vocab"], ModelCache]:
    """The logits after the last token of every prompt, and the cache there; `room` follows from the tokens' shape."""
    features, cache = model.features(tokens, segment_ids=segment_ids, return_cache=True)
    assert cache is not None
    return model.head(features[:, -1]), model.extend_cache(cache, room)


@partial(jax.jit, donate_argnames=("logits", "cache", "stopped"))
def _decode(
    model: LanguageModel,
    logits: Float[Array, "batch vocab"],
    cache: ModelCache,
    stopped: Bool[Array, " batch"],
    key: PRNGKeyArray,
    numbers: SamplingNumbers,
    stops: Bool[Array, " vocab"],
    where: Int[Array, "2"],
) -> tuple[Float[Array, "batch vocab"], ModelCache, Bool[Array, " batch"], Int[Array, "batch block"]]:
    """Draws tokens until every row has stopped or the block has as many as it should.

    Args:
        logits, cache, stopped: where every row stands.
        key, numbers, stops: as `generate` has them.
        where: how many tokens there are already, and how many this block should have.

    Returns:
        logits, cache and stopped afterwards, and the block's tokens.
    """
    batch, (start, count) = logits.shape[0], where
    keys = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(batch))

    def unfinished(carry: tuple) -> Array:
        index, _, _, stopped, _ = carry
        return (index < count) & ~jnp.all(stopped)

    def add(carry: tuple) -> tuple:
        index, logits, cache, stopped, new = carry
        token = draw(logits, numbers, jax.vmap(jax.random.fold_in, (0, None))(keys, start + index))
        new = jax.lax.dynamic_update_slice(new, token[:, None], (jnp.zeros((), index.dtype), index))
        features, cache = model.features(token[:, None], cache=cache)
        return index + 1, model.head(features[:, 0]), cache, stopped | stops[token], new

    new = jnp.zeros((batch, _BLOCK), jnp.int32)
    _, logits, cache, stopped, new = jax.lax.while_loop(
        unfinished, add, (jnp.zeros((), jnp.int32), logits, cache, stopped, new)
    )
    return logits, cache, stopped, new


def _before(tokens: Int[np.ndarray, " new"], stops: Bool[np.ndarray, " vocab"]) -> list[int]:
    """The tokens before the first that ends a sequence."""
    (ends,) = np.nonzero(stops[tokens])
    kept: list[int] = tokens[: ends[0] if len(ends) else None].tolist()
    return kept
