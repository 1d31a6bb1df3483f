"""From what somebody wants continued, a text or a conversation, to the tokens that a run's model knows."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from delta_jax.data import ChatTemplate, JsonTokenizer, Tokenizer, load_chat_template
from delta_jax.data.examples import encode_chat

__all__ = ["Writer"]

GENERATION_CONFIG = "generation_config.json"


class Writer:
    """Writes prompts as a run's model knows them: documents, or conversations by the chat template in the run's folder.

    Args:
        folder: of the run; beside its tokenizer.json there may be chat_template.jinja, tokenizer_config.json and
            generation_config.json, as Hugging Face lays them out.
        tokenizer: of the run.
        chat: whether a prompt is the message of a user.
        system: a message of the system that begins every conversation.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer, *, chat: bool = False, system: str | None = None):
        self._folder, self._tokenizer, self._chat, self._system = folder, tokenizer, chat, system
        self._template: ChatTemplate | None = None

    def tokens(self, record: Mapping[str, Any], *, continues: bool = False) -> list[int]:
        """The tokens of an object with "prompt" or "messages".

        Args:
            record: the object.
            continues: whether a text comes right after something else, and begins no document.

        Raises:
            ValueError: it is a conversation and there is no template, or the template refuses it.
        """
        if "messages" not in record and not self._chat:
            if self._system is not None:
                raise ValueError('--system belongs to a conversation: give --chat as well, or "messages"')
            text = self._tokenizer.encode(record["prompt"]).tolist()
            return text if continues else [self._tokenizer.document_id, *text]
        if continues:
            raise ValueError("--prefix is continued by texts, and not by conversations, which begin anew")
        messages = record.get("messages", [{"role": "user", "content": record.get("prompt")}])
        if self._system is not None:
            if any(isinstance(message, dict) and message.get("role") == "system" for message in messages):
                raise ValueError("--system: a conversation has a message of the system already")
            messages = [{"role": "system", "content": self._system}, *messages]
        self._template = self._template or load_chat_template(self._folder)
        if self._template is None:
            raise ValueError(
                f"a conversation needs the chat template of the model: {self._folder} has neither chat_template.jinja nor "
                "one in tokenizer_config.json"
            )
        ids: list[int] = encode_chat(self._json(), self._template, messages, add_generation_prompt=True).tolist()
        if not ids:
            raise ValueError("messages: the chat template makes no text of them")
        return ids

    def _json(self) -> JsonTokenizer:
        if not isinstance(self._tokenizer, JsonTokenizer):
            raise ValueError(
                "a conversation needs the special tokens of a tokenizer.json, and this run's tokens are bytes"
            )
        return self._tokenizer

    def stops(self) -> tuple[list[int], list[str]]:
        """The tokens that end what was written so far, and texts that do.

        They are the document id, what generation_config.json calls "eos_token_id", one or several, and, if there is none and
        a conversation was written, the eos token of tokenizer_config.json, which is a text where the tokenizer has no single
        token for it.

        Raises:
            ValueError: generation_config.json is not JSON, or its ids are none of the tokenizer's.
        """
        document, path = self._tokenizer.document_id, self._folder / GENERATION_CONFIG
        ids = _eos_ids(path) if path.is_file() else []
        size = self._tokenizer.vocab_size
        if not all(isinstance(id, int) and not isinstance(id, bool) and 0 <= id < size for id in ids):
            raise ValueError(f'{path}: "eos_token_id" should be a token of [0, {size}) or a list of some, got {ids}')
        text = None if ids or self._template is None else self._template.tokens.get("eos_token")
        if not text:
            return [document, *ids], []
        ids = self._json().encode_special(text)[0].tolist()
        return ([document, *ids], []) if len(ids) == 1 else ([document], [text])


def _eos_ids(path: Path) -> list[Any]:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    ids = table.get("eos_token_id") if isinstance(table, dict) else None
    return [] if ids is None else ids if isinstance(ids, list) else [ids]
