"""Many prompts, in batches of about the same length."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Unpack

from delta_jax.inference.generate import Options, stream
from delta_jax.inference.reading import Prompt, check_prompts, is_sequence
from delta_jax.inference.text import Finish, Piece
from delta_jax.layers.checks import require_counts, require_positive_integers
from delta_jax.models import LanguageModel

__all__ = ["Completion", "complete"]

_AHEAD = 8  # batches whose prompts are sorted by length at once, and so may wait for one another


@dataclass(frozen=True)
class Completion:
    """How a prompt goes on.

    Attributes:
        text: the text; "" without a tokenizer.
        tokens: the tokens, without what stops.
        finish_reason: "stop" at a stop token or stop string, "length" at the limit of new tokens.

    Examples:
        >>> Completion("Hi", [72, 105], "length").finish_reason
        'length'
    """

    text: str
    tokens: list[int]
    finish_reason: Finish


def complete(
    model: LanguageModel,
    prompts: Sequence[Prompt],
    *,
    batch_size: int = 8,
    samples: int = 1,
    first: int = 0,
    streams: Sequence[int] | None = None,
    **options: Unpack[Options],
) -> Iterator[list[Completion]]:
    """Continues many prompts, and yields the samples of each in the prompts' order, as soon as there are those before it.

    Batches have prompts of about the same length, chosen among those of the next eight batches, and all have the same
    number of rows. What a prompt draws depends on the key and its place among the prompts, not on its batch.

    Args:
        model: a language model.
        prompts: token ids.
        batch_size: how many prompts are read and continued at once; rows are `samples` times as many.
        samples: how many continuations of each prompt.
        first: prompts before this one are left out; the others get what they got with them.
        streams: as `stream` has them, one for each of all prompts; default its place among them.
        **options: as `stream` has them; a `prefix` has one row.

    Raises:
        ValueError: at once, as `stream`, or batch_size or first is no count.

    Examples:
        >>> mixer = MixerSpec(mixer="delta_net", options=(("num_heads", 2),))
        >>> config = ModelConfig(vocab_size=257, hidden_size=8, num_layers=1, pattern=(mixer,), intermediate_size=0)
        >>> model = LanguageModel(config, rngs=nnx.Rngs(0))
        >>> prompts = [[1, 2, 3], [4], [5, 6]]
        >>> [len(one.tokens) for (one,) in complete(model, prompts, batch_size=2, max_new_tokens=4)]
        [4, 4, 4]
    """
    require_positive_integers(batch_size=batch_size)
    require_counts(first=first)
    check_prompts(prompts, model.config.vocab_size, "prompt", empty=options.get("prefix") is not None)
    own = range(len(prompts)) if streams is None else streams
    if not is_sequence(own) or len(own) != len(prompts):
        raise ValueError(f"streams must be integers, one for each of {len(prompts)} prompts, got {streams!r}")

    def run(numbers: Sequence[int]) -> Iterator[list[Piece]]:
        taken = [prompts[number] for number in numbers]
        return stream(model, taken, samples=samples, streams=[own[number] for number in numbers], **options)

    run([0, 0])  # nothing is computed before the first piece is asked for
    rows = min(batch_size, max(len(prompts) - first, 1))
    lengths = [len(prompt) for prompt in prompts]
    return _in_order(run, lengths, rows, samples, first)


def _in_order(
    run: Callable[[Sequence[int]], Iterator[list[Piece]]], lengths: list[int], rows: int, samples: int, first: int
) -> Iterator[list[Completion]]:
    for start in range(first, len(lengths), rows * _AHEAD):
        window = sorted(range(start, min(start + rows * _AHEAD, len(lengths))), key=lengths.__getitem__)
        done: dict[int, list[Completion]] = {}
        for place in range(0, len(window), rows):
            numbers = window[place : place + rows]
            full = numbers + numbers[-1:] * (rows - len(numbers))  # so that one number of rows is compiled
            found = _joined(run(full))
            done |= {number: found[n * samples : (n + 1) * samples] for n, number in enumerate(numbers)}
            while start in done:
                yield done.pop(start)
                start += 1


def _joined(blocks: Iterator[list[Piece]]) -> list[Completion]:
    """What the pieces of each row are together."""
    rows = list(zip(*blocks, strict=True))
    return [
        Completion(
            "".join(piece.text for piece in pieces),
            [token for piece in pieces for token in piece.tokens],
            pieces[-1].finish or "length",
        )
        for pieces in rows
    ]
