"""Records as token ids: documents, prompts with their completions, conversations; and what of them is learnt."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from delta_jax.data.chat import ChatTemplate, load_chat_template
from delta_jax.data.config import DataConfig
from delta_jax.data.packing import Piece
from delta_jax.data.records import DataError
from delta_jax.data.tokenizer import JsonTokenizer, Tokenizer, load_tokenizer

Encoder = Callable[[str, str], Piece]
"""From a document's text, as `load_documents` gives it, and where it is, to a piece."""

TOO_LONG = "no token to learn within sequence_length"
_DAY = datetime(2025, 1, 1)  # for templates that ask: what is learnt should not change from day to day
_TAIL = 16  # characters at the end of a turn that must be where it is found


def encoder(config: DataConfig, sequence_length: int) -> Encoder:
    """What makes tokens of a corpus's documents, for rows of a length.

    Raises:
        ValueError: there is no such tokenizer, or, for messages, no chat template beside it.
    """
    tokenizer = load_tokenizer(config.tokenizer)
    if config.records == "text":
        return functools.partial(_document, tokenizer)
    if config.records == "completion":
        return functools.partial(_completion, tokenizer, sequence_length)
    template = template_of(config)
    assert isinstance(tokenizer, JsonTokenizer)
    return functools.partial(_conversation, tokenizer, template, sequence_length)


def template_of(config: DataConfig) -> ChatTemplate:
    """The chat template beside the tokenizer of a corpus.

    Raises:
        ValueError: there is none.
    """
    template = None if config.tokenizer == "bytes" else load_chat_template(Path(config.tokenizer).parent)
    if template is None:
        raise ValueError(
            f"data.records: messages are written by a chat template, and there is none beside data.tokenizer "
            f"({config.tokenizer}): wanted a tokenizer.json with a chat_template.jinja or a tokenizer_config.json"
        )
    return template


def require_text(config: DataConfig, why: str) -> None:
    """Raises a ValueError if records are no text."""
    if config.records != "text":
        raise ValueError(f"data.records: wanted text, got {config.records}: {why}.")


def content(config: DataConfig, text: str) -> str:
    """The words in a document's text."""
    if config.records == "text":
        return text
    record = json.loads(text)
    texts = record.values() if config.records == "completion" else [turn.get("content") for turn in record["messages"]]
    return "\n".join(one for one in texts if isinstance(one, str))


def encode_text(tokenizer: Tokenizer, text: str, where: str) -> tuple[np.ndarray, np.ndarray]:
    """`Tokenizer.encode_with_bytes`, with a DataError that names the place."""
    try:
        return tokenizer.encode_with_bytes(text)
    except ValueError as error:
        raise DataError(f"{str(error).rstrip('.')} (in {where}).", "not encodable") from None


def encode_chat(
    tokenizer: JsonTokenizer,
    template: ChatTemplate,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = False,
) -> np.ndarray:
    """Token ids of a conversation as the template writes it, int32: its special tokens are, and none in the messages is.

    Args:
        tokenizer: of the ids.
        template: of the text.
        messages: see `ChatTemplate.render`.
        add_generation_prompt: whether the beginning of the assistant's next turn stands at the end.

    Raises:
        ValueError: see `ChatTemplate.render`.
    """
    text = template.render(_shielded(tokenizer, messages), add_generation_prompt=add_generation_prompt)
    return tokenizer.encode_special(text)[0]


def _document(tokenizer: Tokenizer, text: str, where: str) -> Piece:
    """All of a text, between two document ids."""
    ids, sizes = encode_text(tokenizer, text, where)
    tokens = np.zeros((2, len(ids) + 2), np.int32)
    tokens[0, 0] = tokens[0, -1] = tokenizer.document_id
    tokens[0, 1:-1], tokens[1, 1:-1] = ids, sizes
    tokens[1, -1] = len(text.encode()) - sizes.sum()
    return tokens


def _completion(tokenizer: Tokenizer, length: int, text: str, where: str) -> Piece:
    """A document id and the prompt, then what is learnt: the completion and the document id that closes it.

    The two are made tokens of apart, as they are when the prompt is all that there is to go on from.
    """
    record = json.loads(text)
    prompt, _ = encode_text(tokenizer, record["prompt"], where)
    completion = _document(tokenizer, record["completion"], where)
    assert isinstance(completion, np.ndarray)
    tokens = np.zeros((3, 1 + len(prompt) + completion.shape[1] - 1), np.int32)
    tokens[0, 0], tokens[0, 1 : 1 + len(prompt)] = tokenizer.document_id, prompt
    tokens[:2, 1 + len(prompt) :], tokens[2, 1 + len(prompt) :] = completion[:, 1:], 1
    return _cut(tokens, length)


def _conversation(tokenizer: JsonTokenizer, template: ChatTemplate, length: int, text: str, where: str) -> Piece:
    """A conversation as the template writes it; what is learnt are the tokens that begin in the assistant's turns."""
    messages = _shielded(tokenizer, json.loads(text)["messages"])
    try:
        written, spans = _turns(template, messages)
        ids, sizes, starts = tokenizer.encode_special(written)
    except ValueError as error:
        raise DataError(f"data.records: {str(error).rstrip('.')} (in {where}).", "not renderable") from None
    learnt = np.zeros(len(ids), bool)
    for start, end in spans:
        learnt |= (start <= starts) & (starts < end)
    return _cut(np.stack([ids, sizes * learnt, learnt]).astype(np.int32), length)


def _cut(tokens: np.ndarray, length: int) -> Piece:
    """The tokens that a row has room for; why there is no piece where none of them is learnt."""
    tokens = tokens[:, : length + 1]
    return tokens if tokens[2, 1:].any() else TOO_LONG


def _turns(template: ChatTemplate, messages: list[dict[str, Any]]) -> tuple[str, list[tuple[int, int]]]:
    """A conversation as text, and from where to where in it the assistant's turns reach.

    A turn begins where the text up to it, with the beginning of the assistant's turn that generation is given, ends; it
    ends where the text up to and with it does. Templates that write a turn otherwise once there are later ones leave
    something out of it at its beginning, such as the thoughts: then what is left of it is found by its end.

    Raises:
        ValueError: the template refuses the conversation, or a turn is not found.
    """
    render = functools.partial(template.render, strftime_now=_DAY.strftime)
    whole, spans = render(messages), []
    for number, turn in enumerate(messages):
        if turn["role"] != "assistant":
            continue
        try:
            before = render(messages[:number], add_generation_prompt=True)
        except ValueError:
            if number:
                raise
            before = ""  # a template that refuses to write no turn at all
        start = _common(before, whole)
        upto = render(messages[: number + 1])
        size = len(upto) - start
        if not whole.startswith(upto):
            size = next(
                (size for size in range(len(whole) - start, 0, -1) if upto.endswith(whole[start : start + size])), 0
            )
        said = turn.get("content")
        tail = said.strip()[-_TAIL:] if isinstance(said, str) else ""
        if size <= 0 or tail not in whole[start : start + size]:
            raise ValueError(
                f"{template.where} writes turn {number}, of the assistant, so that it is not found in the text"
            )
        spans.append((start, start + size))
    return whole, spans


def _common(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((number for number, (a, b) in pairs if a != b), min(len(one), len(other)))


def _shielded(tokenizer: JsonTokenizer, value: Any) -> Any:
    """Messages in which no text is taken for a special token."""
    if isinstance(value, str):
        return tokenizer.shield(value)
    if isinstance(value, Mapping):
        return {key: _shielded(tokenizer, item) for key, item in value.items()}
    return [_shielded(tokenizer, item) for item in value] if isinstance(value, list | tuple) else value
