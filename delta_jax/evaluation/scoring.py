"""How likely continuations are: contexts that requests share are read once, and so are beginnings that contexts share."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from delta_jax.inference import Reading, log_probabilities, read_prompts, take_rows
from delta_jax.inference.reading import Prompt, check_prompts
from delta_jax.layers.checks import require_positive_integers
from delta_jax.models import LanguageModel

__all__ = ["Score", "score"]

type Tokens = tuple[int, ...]

_STEP = 32  # beginnings are shared in multiples of this many tokens


class Score(NamedTuple):
    """How likely a continuation is.

    Attributes:
        log_probability: of all its tokens together, in nats.
        greedy: whether each of them is the likeliest at its place.

    Examples:
        >>> Score(-1.5, False).log_probability
        -1.5
    """

    log_probability: float
    greedy: bool


def score(
    model: LanguageModel,
    requests: Sequence[tuple[Prompt, Prompt]],
    *,
    max_length: int,
    batch_size: int = 8,
    shared_prefixes: bool = True,
    progress: Callable[[int], object] | None = None,
) -> list[Score]:
    """How likely each continuation is after its context.

    A context is read once, whatever the number of its continuations, each of which goes on from what the model then
    remembers. Where many contexts begin alike, as those with the same examples before them do, the beginning is read once
    as well. Results are those of reading every request alone, to float32 rounding.

    What is compiled depends on the model, on the batch size and, for contexts, their common beginnings and continuations,
    on the next power of two of the longest one's length in a batch; batches are of about the same length.

    Args:
        model: a language model.
        requests: pairs of a context, at least one token, and a continuation, which may be empty: its score is 0 and greedy.
        max_length: tokens that the model reads at most. Of a longer request, without the last token, which is not read, the
            first tokens are left out.
        batch_size: contexts that are read at once, and continuations that are scored at once.
        shared_prefixes: whether contexts, and what they begin with, are read once; if not, every request is read for itself.
        progress: called with how many requests have been scored, as they are.

    Returns:
        A score for each request, in their order.

    Raises:
        ValueError: max_length or batch_size is no positive integer, a context is empty, a token is outside the vocabulary,
            or a continuation is longer than max_length.

    Examples:
        >>> mixer = MixerSpec(mixer="delta_net", options=(("num_heads", 2),))
        >>> config = ModelConfig(vocab_size=11, hidden_size=8, num_layers=1, pattern=(mixer,), intermediate_size=0)
        >>> model = LanguageModel(config, rngs=nnx.Rngs(0))
        >>> answers = score(model, [([1, 2, 3], [4]), ([1, 2, 3], [5, 6])], max_length=64)
        >>> [answer.log_probability < 0 for answer in answers]
        [True, True]
    """
    require_positive_integers(max_length=max_length, batch_size=batch_size)
    if len(requests) == 0:
        return []
    vocabulary = model.config.vocab_size
    check_prompts([context for context, _ in requests], vocabulary, "context")
    check_prompts([continuation for _, continuation in requests], vocabulary, "continuation", empty=True)
    scores: list[Score] = [Score(0.0, True)] * len(requests)
    contexts: dict[object, tuple[Tokens, list[int]]] = {}
    for number, (context, continuation) in enumerate(requests):
        if len(continuation) > max_length:
            raise ValueError(
                f"continuation {number} has {len(continuation)} tokens, more than max_length, which is {max_length}"
            )
        if len(continuation):
            kept = max_length + 1 - len(continuation)
            read = tuple(int(token) for token in context[-kept:])
            contexts.setdefault(read if shared_prefixes else number, (read, []))[1].append(number)
    for pairs, found in _batches(model, list(contexts.values()), requests, batch_size, shared_prefixes):
        for number, one in zip(pairs, found, strict=True):
            scores[number] = one
        if progress is not None:
            progress(len(pairs))
    return scores


def _batches(
    model: LanguageModel,
    contexts: list[tuple[Tokens, list[int]]],
    requests: Sequence[tuple[Prompt, Prompt]],
    batch_size: int,
    shared: bool,
) -> Iterator[tuple[list[int], list[Score]]]:
    """The scores of some requests after the other, with their numbers."""
    rows = min(batch_size, len(contexts))
    lines = min(batch_size, sum(len(numbers) for _, numbers in contexts))
    texts = [context for context, _ in contexts]
    for start, members in _families(texts, rows) if shared else [(0, list(range(len(texts))))]:
        after = read_prompts(model, [texts[members[0]][:start]]) if start else None
        for place in range(0, len(members), rows):
            batch = members[place : place + rows]
            prompts: list[Prompt] = [texts[member][start:] for member in batch]
            reading = read_prompts(model, _full(prompts, rows), after=after)
            pairs = [(row, number) for row, member in enumerate(batch) for number in contexts[member][1]]
            yield from _scored(model, reading, pairs, requests, lines)


def _scored(
    model: LanguageModel,
    reading: Reading,
    pairs: list[tuple[int, int]],
    requests: Sequence[tuple[Prompt, Prompt]],
    lines: int,
) -> Iterator[tuple[list[int], list[Score]]]:
    """The scores of requests whose contexts are rows of the reading, those with short continuations first."""
    pairs = sorted(pairs, key=lambda pair: len(requests[pair[1]][1]))
    for place in range(0, len(pairs), lines):
        batch = pairs[place : place + lines]
        full = _full(batch, lines)
        continuations = [requests[number][1] for _, number in full]
        found = log_probabilities(model, take_rows(reading, [row for row, _ in full]), continuations)
        yield (
            [number for _, number in batch],
            [
                Score(float(one.log_probabilities.sum(dtype="float64")), bool(one.greedy.all()))
                for one in found[: len(batch)]
            ],
        )


def _full[Item](items: list[Item], size: int) -> list[Item]:
    """As many as the size, the last repeated: so that one number of rows is compiled."""
    return items + items[-1:] * (size - len(items))


def _families(contexts: list[Tokens], rows: int) -> Iterator[tuple[int, list[int]]]:
    """Contexts that begin alike: how many tokens they share, and their numbers, the shortest contexts first.

    Those that have no family, or one so small that a batch less full costs more than is spared, share nothing.
    """
    alone: list[int] = []
    waiting = [(0, list(range(len(contexts))))]
    while waiting:
        start, members = waiting.pop()
        blocks: dict[Tokens, list[int]] = {}
        for member in members:
            blocks.setdefault(contexts[member][start : start + _STEP], []).append(member)
        rest: list[int] = []
        for block, those in blocks.items():
            if len(block) == _STEP and len(those) >= max(rows, 2):
                waiting.append((start + _STEP, those))
            else:
                rest += those
        if not rest:
            continue
        rest.sort(key=lambda member: len(contexts[member]))
        spared, lost = start * len(rest), rows * (len(contexts[rest[-1]]) - start)
        if start and spared > lost:
            yield start, rest
        else:
            alone += rest
    if alone:
        yield 0, sorted(alone, key=lambda member: len(contexts[member]))
