"""Text generation: one pass over the prompts, then one token at a time in memory that is fixed beforehand."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TypedDict, Unpack, overload

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray

from delta_jax.inference.reading import (
    BLOCK,
    Prompt,
    Reading,
    check_prompts,
    check_reading,
    is_id,
    is_sequence,
    read_prompts,
    rows_after,
    take_rows,
    with_room,
)
from delta_jax.inference.sampling import Sampling, SamplingNumbers, draw
from delta_jax.inference.text import Decoder, Detokenizer, Piece, Row, stop_strings
from delta_jax.inference.weights import in_compute_dtype
from delta_jax.layers.checks import require_positive_integers
from delta_jax.models import LanguageModel, ModelCache

__all__ = ["Options", "generate", "stream"]


class Options(TypedDict, total=False):
    """How prompts are continued; what each means is said at `stream`, whose defaults they have.

    Examples:
        >>> Options(max_new_tokens=20, temperature=0.8, top_p=0.95)
        {'max_new_tokens': 20, 'temperature': 0.8, 'top_p': 0.95}
    """

    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    stop_id: int | Sequence[int] | None
    stop: str | Sequence[str] | None
    tokenizer: Decoder | None
    prefix: Reading | None
    key: PRNGKeyArray | None


@overload
def generate(
    model: LanguageModel, prompts: Sequence[Prompt], *, samples: None = None, **options: Unpack[Options]
) -> list[list[int]]: ...
@overload
def generate(
    model: LanguageModel, prompts: Sequence[Prompt], *, samples: int, **options: Unpack[Options]
) -> list[list[list[int]]]: ...
def generate(
    model: LanguageModel, prompts: Sequence[Prompt], *, samples: int | None = None, **options: Unpack[Options]
) -> list[list[int]] | list[list[list[int]]]:
    """Continues every prompt.

    Args:
        model: a language model.
        prompts: token ids, at least one a prompt.
        samples: how many continuations of each prompt; None is one.
        **options: as `stream` has them: max_new_tokens, and, if wanted, temperature, top_k, top_p, min_p,
            repetition_penalty, stop_id, stop, tokenizer, prefix, key.

    Returns:
        the new tokens of each prompt, without what stops; if samples are given, of each of its samples.

    Raises:
        ValueError: as `stream`.

    Examples:
        >>> mixer = MixerSpec(mixer="delta_net", options=(("num_heads", 2),))
        >>> config = ModelConfig(vocab_size=11, hidden_size=8, num_layers=1, pattern=(mixer,), intermediate_size=0)
        >>> model = LanguageModel(config, rngs=nnx.Rngs(0))
        >>> new = generate(model, [[1, 2, 3], [4]], max_new_tokens=2)
        >>> [len(tokens) for tokens in new]
        [2, 2]
    """
    rows: list[list[int]] = []
    # Where text decides when a row ends, a row that has ended should not keep the others waiting.
    block = BLOCK if options.get("stop") is None else _FLOWS
    for pieces in stream(model, prompts, samples=1 if samples is None else samples, block=block, **options):
        rows = [row + piece.tokens for row, piece in zip(rows or [[] for _ in pieces], pieces, strict=True)]
    return rows if samples is None else [rows[start : start + samples] for start in range(0, len(rows), samples)]


_FLOWS = 8  # tokens a block where somebody waits for the text


def stream(
    model: LanguageModel,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    stop_id: int | Sequence[int] | None = None,
    stop: str | Sequence[str] | None = None,
    tokenizer: Decoder | None = None,
    prefix: Reading | None = None,
    key: PRNGKeyArray | None = None,
    streams: Sequence[int] | None = None,
    samples: int = 1,
    block: int = _FLOWS,
) -> Iterator[list[Piece]]:
    """Continues every prompt, and yields what is new as it comes.

    Prompts of different lengths share a batch (`read_prompts`), and the result of each is that of the prompt alone. They
    are read once, whatever the number of samples.

    What is compiled depends on the model, on how many prompts and samples there are and, for the pass over the prompts, on
    the next power of two of the longest one's length (at least 8). Where attention keeps every token, its cache grows by
    powers of two, and the loop is compiled for each. No other argument is static, and none changes the tokens before the
    place where it first matters: a larger max_new_tokens gives the same tokens bit for bit and then more.

    Args:
        model: a language model.
        prompts: token ids, at least one a prompt; after a prefix there may be none.
        max_new_tokens: how many tokens to add at most.
        temperature: 0 takes the likeliest token; above 0 tokens are drawn, which needs a key.
        top_k, top_p, min_p: see `Sampling`.
        repetition_penalty: see `Sampling`; for the tokens of prefix, prompt and continuation.
        stop_id: a row ends before this token, or before the first of several; None never ends early.
        stop: a row's text ends before this text, or before the first of several, also where it begins and ends within
            tokens; needs a tokenizer. Tokens end with the last that lies before it as a whole.
        tokenizer: makes the pieces' text; None makes none.
        prefix: what was read before the prompts, as `read_prompts` or `load_prefix` returns it: a row for all, or for each.
            The result is that of prefix and prompt together within float32 rounding.
        key: a PRNG key. Each sample of each prompt draws from its own stream.
        streams: a number for each prompt that chooses its streams; default its place in the batch.
        samples: how many continuations of each prompt. The first of them is what samples=1 gives.
        block: how many tokens are made before they are yielded, at most 64.

    Yields:
        A piece for each row after every block, until all have ended. Rows are the samples of the first prompt, then those
        of the second, and so on. A row that has ended is computed no further from the next block on; it yields empty pieces.

    Raises:
        ValueError: at once, if a prompt is empty or holds an id outside the vocabulary, or an option is impossible.

    Examples:
        >>> mixer = MixerSpec(mixer="delta_net", options=(("num_heads", 2),))
        >>> config = ModelConfig(vocab_size=257, hidden_size=8, num_layers=1, pattern=(mixer,), intermediate_size=0)
        >>> model, tokenizer = LanguageModel(config, rngs=nnx.Rngs(0)), ByteTokenizer()
        >>> for (piece,) in stream(model, [tokenizer.encode("a")], max_new_tokens=3, block=2, tokenizer=tokenizer):
        ...     print(len(piece.tokens), piece.finish)  # and piece.text, which this model has not learnt to write
        1 None
        2 length
    """
    sampling = Sampling(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty
    )
    vocab_size = model.config.vocab_size
    require_positive_integers(max_new_tokens=max_new_tokens, samples=samples, block=block)
    if block > BLOCK:
        raise ValueError(f"block must be at most {BLOCK}, got {block}")
    if temperature > 0 and key is None:
        raise ValueError("key must be given when temperature is above 0")
    if key is not None and not _is_key(key):
        raise ValueError(f"key must be one PRNG key, as jax.random.key makes it, got {key!r}")
    stops, texts = _stops(stop_id, vocab_size), stop_strings(stop, tokenizer)
    check_prompts(prompts, vocab_size, "prompt", empty=prefix is not None)
    if prefix is not None:
        check_reading(model, prefix, "prefix")
        rows_after(prefix, len(prompts))
    if streams is None:
        streams = range(len(prompts))
    if (
        not is_sequence(streams)
        or len(streams) != len(prompts)
        or not all(is_id(n) and 0 <= n < 2**31 for n in streams)
    ):
        raise ValueError(
            f"streams must be integers in [0, 2^31), one for each of {len(prompts)} prompts, got {streams!r}"
        )
    place = np.repeat(np.arange(len(prompts)), samples)
    rows = [
        Row(stops, texts, max_new_tokens, None if tokenizer is None else _writer(tokenizer, prompts[number], prefix))
        for number in place.tolist()
    ]
    # A key that is not used spares a second program.
    key = jax.random.key(0) if key is None else key
    keys = _keys(key, np.asarray(streams, np.uint32)[place], np.tile(np.arange(samples, dtype=np.uint32), len(prompts)))

    def read() -> Reading:
        reading = read_prompts(model, prompts, after=prefix)
        return reading if samples == 1 else take_rows(reading, place)

    return _blocks(model, read, rows, keys, sampling.numbers(), jnp.asarray(stops), max_new_tokens, block)


def _blocks(
    model: LanguageModel,
    read: Callable[[], Reading],
    rows: list[Row],
    keys: Key[Array, " batch"],
    numbers: SamplingNumbers,
    stops: Bool[Array, " vocab"],
    max_new_tokens: int,
    block: int,
) -> Iterator[list[Piece]]:
    reading, model = read(), in_compute_dtype(model)
    for start in range(0, max_new_tokens, block):
        count = min(block, max_new_tokens - start)
        reading = with_room(model, reading, count)
        stopped = jnp.asarray([row.finish is not None for row in rows])
        where = jnp.asarray((start, count), jnp.int32)
        logits, cache, seen, new = _decode(
            model, reading.logits, reading.cache, reading.seen, stopped, keys, numbers, stops, where
        )
        reading = Reading(logits, cache, seen, reading.lengths + count, reading.room)
        yield [row.add(tokens) for row, tokens in zip(rows, np.asarray(new)[:, :count].tolist(), strict=True)]
        if all(row.finish is not None for row in rows):
            return


def _writer(tokenizer: Decoder, prompt: Prompt, prefix: Reading | None) -> Detokenizer:
    # What a prefix says is not known any more; any text stands for it.
    after_text = prefix is not None and len(prompt) == 0
    return Detokenizer(tokenizer, tokenizer.encode("a") if after_text else prompt)


def _stops(stop_id: int | Sequence[int] | None, vocab_size: int) -> Bool[np.ndarray, " vocab"]:
    """Which tokens end a sequence."""
    ids = () if stop_id is None else np.atleast_1d(np.asarray(stop_id, object))
    stops = np.zeros((vocab_size,), bool)
    for token in ids:
        if not is_id(token) or not 0 <= token < vocab_size:
            raise ValueError(f"stop_id must lie in [0, {vocab_size}), got {token!r}")
        stops[token] = True
    return stops


def _is_key(key: object) -> bool:
    if not isinstance(key, jax.Array):
        return False
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return key.shape == ()
    return key.ndim == 1 and key.dtype == jnp.uint32


@jax.jit
def _keys(key: PRNGKeyArray, streams: Array, samples: Array) -> Key[Array, " batch"]:
    """The key of every row. Those of further samples are counted from the other end, so that none is a prompt's."""

    def one(stream: Array, sample: Array) -> Array:
        further = jax.random.fold_in(key, jnp.zeros((), jnp.uint32) - sample)
        return jax.random.fold_in(jax.lax.cond(sample == 0, lambda: key, lambda: further), stream)

    keys: Array = jax.vmap(one)(streams, samples)
    return keys


@partial(jax.jit, donate_argnames=("logits", "cache", "seen"))
def _decode(
    model: LanguageModel,
    logits: Float[Array, "batch vocab"],
    cache: ModelCache,
    seen: Bool[Array, "batch vocab"],
    stopped: Bool[Array, " batch"],
    keys: Key[Array, " batch"],
    numbers: SamplingNumbers,
    stops: Bool[Array, " vocab"],
    where: Int[Array, "2"],
) -> tuple[Float[Array, "batch vocab"], ModelCache, Bool[Array, "batch vocab"], Int[Array, "batch block"]]:
    """Draws tokens until every row has stopped or the block has as many as it should.

    Args:
        logits, cache, seen, stopped: where every row stands.
        keys, numbers, stops: how it goes on.
        where: how many tokens there are already, and how many this block should have.

    Returns:
        logits, cache and seen afterwards, and the block's tokens.
    """
    batch, (start, count) = logits.shape[0], where
    vocabulary = jnp.arange(logits.shape[1], dtype=jnp.int32)[None]

    def unfinished(carry: tuple) -> Array:
        index, _, _, _, stopped, _ = carry
        return (index < count) & ~jnp.all(stopped)

    def add(carry: tuple) -> tuple:
        index, logits, cache, seen, stopped, new = carry
        token = draw(logits, numbers, jax.vmap(jax.random.fold_in, (0, None))(keys, start + index), seen)
        new = jax.lax.dynamic_update_slice(new, token[:, None], (jnp.zeros((), index.dtype), index))
        features, cache = model.features(token[:, None], cache=cache)
        seen = seen | (token[:, None] == vocabulary)  # scattered, they would be laid out twice anew
        return index + 1, model.head(features[:, 0]), cache, seen, stopped | stops[token], new

    new = jnp.zeros((batch, BLOCK), jnp.int32)
    _, logits, cache, seen, _, new = jax.lax.while_loop(
        unfinished, add, (jnp.zeros((), jnp.int32), logits, cache, seen, stopped, new)
    )
    return logits, cache, seen, new
