"""Reading: prompts of different lengths at once, what a model remembers of them, and how likely it finds what may follow."""

import operator
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from delta_jax.layers.checks import require_cache
from delta_jax.models import LanguageModel, ModelCache
from delta_jax.models.loss import token_nats
from delta_jax.ops.padding import first_tokens

__all__ = ["Reading", "Scored", "log_probabilities", "read_prompts", "take_rows"]

type Prompt = Sequence[int] | Int[np.ndarray, " _"]

BLOCK = 64  # tokens for which there is room after a reading, and that the loop of decoding adds at most in one call
_SHORTEST = 8  # prompts are padded to this many tokens at least
_AT_ONCE = 1 << 25  # logits that scoring makes at once: 128 MiB


class Reading(NamedTuple):
    """What a model remembers of texts it has read, one a row.

    Attributes:
        logits: [B, V] float32, of the token that comes next.
        cache: the model's, of B sequences. Its size is constant but for attention without a window, which keeps tokens.
        seen: [B, V] bool, which tokens a text holds.
        lengths: [B] int64 on the host, tokens read.
        room: for how many tokens caches that keep them all are made.

    Examples:
        >>> nothing = Reading(jnp.zeros((2, 11)), (), jnp.zeros((2, 11), bool), np.zeros(2, int), room=8)
        >>> nothing.logits.shape, nothing.lengths.tolist()
        ((2, 11), [0, 0])
    """

    logits: Float[Array, "batch vocab"]
    cache: ModelCache
    seen: Bool[Array, "batch vocab"]
    lengths: Int[np.ndarray, " batch"]
    room: int


class Scored(NamedTuple):
    """How likely a continuation is.

    Attributes:
        log_probabilities: [n] float32, of each of its tokens after all before it, in nats.
        greedy: [n] bool, whether the token is the likeliest there.

    Examples:
        >>> Scored(np.array([-0.5, -1.5], np.float32), np.array([True, False])).log_probabilities.sum().item()
        -2.0
    """

    log_probabilities: Float[np.ndarray, " tokens"]
    greedy: Bool[np.ndarray, " tokens"]


def read_prompts(model: LanguageModel, prompts: Sequence[Prompt], *, after: Reading | None = None) -> Reading:
    """Reads prompts of any lengths at once; the result of each is that of the prompt alone.

    Rows are padded at the end and a mask says so. What is compiled depends on the model, on how many prompts there are and
    on the next power of two of the longest one's length (at least 8); where attention keeps every token, also on the
    power of two of `after`'s room.

    Args:
        model: a language model.
        prompts: token ids, at least one a prompt; after another reading there may be none.
        after: what was read before them, one row for all prompts or a row for each; None begins anew.

    Returns:
        A row for each prompt.

    Raises:
        ValueError: a prompt is empty or holds an id outside the vocabulary, or `after` has another number of rows or is
            another model's.

    Examples:
        >>> mixer = MixerSpec(mixer="delta_net", options=(("num_heads", 2),))
        >>> config = ModelConfig(vocab_size=11, hidden_size=8, num_layers=1, pattern=(mixer,), intermediate_size=0)
        >>> reading = read_prompts(LanguageModel(config, rngs=nnx.Rngs(0)), [[1, 2, 3], [4]])
        >>> reading.logits.shape, reading.lengths.tolist()
        ((2, 11), [3, 1])
    """
    check_prompts(prompts, model.config.vocab_size, "prompt", empty=after is not None)
    tokens, lengths = padded(prompts, _SHORTEST)
    if after is None:
        logits, cache, seen = _read(model, tokens, jnp.asarray(lengths, jnp.int32), None)
        return with_room(model, Reading(logits, cache, seen, lengths, tokens.shape[1]), BLOCK)
    check_reading(model, after, "after")
    after = take_rows(after, rows_after(after, len(prompts)))
    after = with_room(model, after, int(lengths.max()) + BLOCK)
    past = (after.logits, after.cache, after.seen)
    logits, cache, seen = _read(model, tokens, jnp.asarray(lengths, jnp.int32), past)
    return Reading(logits, cache, seen, after.lengths + lengths, after.room)


def take_rows(reading: Reading, rows: Sequence[int] | Int[np.ndarray, " _"]) -> Reading:
    """Some rows of a reading, in any order and as often as wanted: `np.repeat(np.arange(B), n)` is n copies of each.

    Raises:
        ValueError: there is no row, or one is not there.

    Examples:
        >>> reading = Reading(jnp.zeros((2, 11)), (), jnp.zeros((2, 11), bool), np.array([3, 1]), room=8)
        >>> take_rows(reading, [1, 1, 0]).lengths.tolist()
        [1, 1, 3]
    """
    there = len(reading.lengths)
    if not is_sequence(rows) or len(rows) == 0 or not all(is_id(row) and 0 <= row < there for row in rows):
        raise ValueError(f"rows must be integers in [0, {there}), at least one, got {rows!r}")
    index = np.asarray(rows, np.int32)
    logits, cache, seen = _take(reading.logits, reading.cache, reading.seen, index)
    return Reading(logits, cache, seen, reading.lengths[index], reading.room)


def log_probabilities(model: LanguageModel, reading: Reading, continuations: Sequence[Prompt]) -> list[Scored]:
    """How likely a continuation is after each text that was read.

    Several continuations of one text are rows of their own (`take_rows`), so the text is read once. What is compiled
    depends on the model, the number of rows, the room of the reading and the next power of two of the longest
    continuation's length. At most 128 MiB of logits exist at once, or those of one token a row.

    Args:
        model: a language model.
        reading: what it has read, B rows. It can be used again.
        continuations: token ids, one continuation a row, at least one token each.

    Returns:
        For each row the log-probability of every token, and whether it is the likeliest.

    Raises:
        ValueError: the number of continuations is not that of the rows, one is empty or holds an id outside the
            vocabulary, or the reading is another model's.

    Examples:
        >>> mixer = MixerSpec(mixer="delta_net", options=(("num_heads", 2),))
        >>> config = ModelConfig(vocab_size=11, hidden_size=8, num_layers=1, pattern=(mixer,), intermediate_size=0)
        >>> model = LanguageModel(config, rngs=nnx.Rngs(0))
        >>> question = read_prompts(model, [[1, 2, 3]])
        >>> answers = log_probabilities(model, take_rows(question, [0, 0]), [[4, 5], [6]])
        >>> [len(answer.log_probabilities) for answer in answers]
        [2, 1]
    """
    check_prompts(continuations, model.config.vocab_size, "continuation")
    check_reading(model, reading, "reading")
    if len(continuations) != len(reading.lengths):
        raise ValueError(
            f"continuations must be one for each of {len(reading.lengths)} rows that were read, got {len(continuations)}"
        )
    tokens, lengths = padded(continuations)
    reading = with_room(model, reading, int(lengths.max()))
    nats, greedy = _score(model, reading.logits, reading.cache, tokens, jnp.asarray(lengths, jnp.int32))
    both = zip(np.asarray(nats), np.asarray(greedy), lengths, strict=True)
    return [Scored(-row[:length], likeliest[:length]) for row, likeliest, length in both]


def with_room(model: LanguageModel, reading: Reading, more: int) -> Reading:
    """The reading with room for so many tokens more, rounded up to a power of two, so that few sizes are ever compiled."""
    wanted = int(reading.lengths.max()) + more
    if wanted <= reading.room:
        return reading
    room = max(256, power_of_two(wanted))
    return reading._replace(cache=model.extend_cache(reading.cache, room), room=room)


def check_prompts(prompts: Sequence[Prompt], vocab_size: int, name: str, *, empty: bool = False) -> None:
    """Raises a ValueError unless each is a sequence of ids of the vocabulary; without tokens only if `empty`."""
    if not is_sequence(prompts) or len(prompts) == 0:
        raise ValueError(f"{name}s must hold at least one {name}, got {prompts!r}")
    for index, prompt in enumerate(prompts):
        if not is_sequence(prompt) or not all(map(is_id, prompt)):
            raise ValueError(f"{name} {index} must be a sequence of token ids, which are integers, got {prompt!r}")
        if len(prompt) == 0 and not empty:
            raise ValueError(f"{name} {index} is empty; a {name} needs at least one token")
        if not all(0 <= token < vocab_size for token in prompt):
            raise ValueError(f"{name} {index} holds a token outside [0, {vocab_size})")


def padded(prompts: Sequence[Prompt], shortest: int = 1) -> tuple[Int[Array, "batch time"], Int[np.ndarray, " batch"]]:
    """Token ids padded at the end to a power of two, and how many of each row there are."""
    lengths = np.asarray([len(prompt) for prompt in prompts], np.int64)
    tokens = np.zeros((len(prompts), max(shortest, power_of_two(int(lengths.max())))), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    return jnp.asarray(tokens), lengths


def power_of_two(number: int) -> int:
    """The next one that is not less."""
    return 1 << max(number - 1, 0).bit_length()


def is_sequence(x: object) -> bool:
    """Whether it is a sequence, of Python, NumPy or JAX; text is none."""
    return (isinstance(x, Sequence) and not isinstance(x, str | bytes)) or bool(getattr(x, "ndim", 0))


def is_id(x: object) -> bool:
    """Whether it is an integer, of Python, NumPy or JAX; True is none."""
    try:
        operator.index(x)  # type: ignore[arg-type]
    except TypeError:
        return False
    return not isinstance(x, bool)


def check_reading(model: LanguageModel, reading: object, name: str) -> None:
    if not isinstance(reading, Reading):
        raise ValueError(f"{name} must be a Reading, what read_prompts or load_prefix returned, got {reading!r}")
    try:
        require_cache(reading.cache, len(reading.lengths), model.init_cache)
    except ValueError as error:
        raise ValueError(f"{name} is another model's: {error}") from None
    if reading.logits.shape[1] != model.config.vocab_size:
        raise ValueError(f"{name} is another model's: it has {reading.logits.shape[1]} logits")


def rows_after(after: Reading, prompts: int) -> Int[np.ndarray, " _"]:
    """The rows of a reading that so many prompts go on from: its only one, or each its own."""
    there = len(after.lengths)
    if there not in (1, prompts):
        raise ValueError(f"after must have one row, or one for each of {prompts} prompts, got {there}")
    return np.zeros(prompts, np.int32) if there == 1 else np.arange(prompts, dtype=np.int32)


@jax.jit
def _take[Arrays](logits: Array, cache: Arrays, seen: Array, rows: Array) -> tuple[Array, Arrays, Array]:
    return logits[rows], jax.tree.map(lambda x: x[:, rows], cache), seen[rows]


@jax.jit
def _read(
    model: LanguageModel,
    tokens: Int[Array, "batch time"],
    lengths: Int[Array, " batch"],
    past: tuple[Array, ModelCache, Array] | None,
) -> tuple[Float[Array, "batch vocab"], ModelCache, Bool[Array, "batch vocab"]]:
    """Logits, cache and tokens seen after the first `lengths` tokens of each row, and after what was read before."""
    mask = first_tokens(lengths, tokens.shape[1])
    before = None if past is None else past[1]
    features, cache = model.features(tokens, mask=mask, cache=before, return_cache=True)
    assert cache is not None
    last = jnp.maximum(lengths - 1, 0)[:, None, None]
    logits = model.head(jnp.take_along_axis(features, last, axis=1)[:, 0])
    seen = jnp.zeros(logits.shape, bool)
    if past is not None:
        logits, seen = jnp.where(lengths[:, None] > 0, logits, past[0]), past[2]
    rows = jnp.arange(tokens.shape[0], dtype=jnp.int32)[:, None]
    return logits, cache, seen.at[rows, tokens].max(mask)


@jax.jit
def _score(
    model: LanguageModel,
    logits: Float[Array, "batch vocab"],
    cache: ModelCache,
    tokens: Int[Array, "batch time"],
    lengths: Int[Array, " batch"],
) -> tuple[Float[Array, "batch time"], Bool[Array, "batch time"]]:
    """Nats of each token, and whether it is the likeliest; the last token need not be read."""
    (rows, time), vocab = tokens.shape, logits.shape[-1]
    mask = first_tokens(lengths, time)
    first = _compared(logits[:, None], tokens[:, :1], mask[:, :1])
    if time == 1:
        return first
    features, _ = model.features(tokens[:, :-1], mask=mask[:, :-1], cache=cache)
    most = max(_AT_ONCE // (rows * vocab), 1)
    size = min(time, 1 << (most.bit_length() - 1))

    def chunks(x: Array) -> Array:
        """[B, T - 1, ...] as [chunks, B, size, ...], with one token more at the end."""
        x = jnp.concatenate([x, x[:, -1:]], axis=1)
        return jnp.moveaxis(x.reshape(rows, time // size, size, *x.shape[2:]), 1, 0)

    def compare(chunk: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        return _compared(model.head(chunk[0]), *chunk[1:])

    others = jax.lax.map(compare, (chunks(features), chunks(tokens[:, 1:]), chunks(mask[:, 1:])))
    nats, greedy = (
        jnp.concatenate([one, jnp.moveaxis(more, 0, 1).reshape(rows, time)[:, :-1]], axis=1)
        for one, more in zip(first, others, strict=True)
    )
    return nats, greedy


def _compared(logits: Array, tokens: Array, mask: Array) -> tuple[Array, Array]:
    """Nats of the tokens [B, T], and whether each is the likeliest, by logits [B, T, V]."""
    return token_nats(logits, tokens, mask), jnp.argmax(logits, axis=-1) == tokens
