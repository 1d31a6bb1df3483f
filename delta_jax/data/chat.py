"""Conversations as text: the chat template of a Hugging Face folder, rendered in a sandbox."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

TEMPLATE = "chat_template.jinja"
TOKENIZER_CONFIG = "tokenizer_config.json"

_TOKENS = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "pad", "sep", "cls", "mask"))


@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """How a model's conversations are written as text.

    It is rendered as transformers renders it: in jinja2's immutable sandbox, which runs no Python, with blocks trimmed and
    stripped, `break` and `continue`, the filter `tojson`, the functions `raise_exception` and `strftime_now`, the tag
    `generation`, and the names of the special tokens.

    Attributes:
        source: the template, in Jinja.
        tokens: special tokens that the template may name, such as "bos_token" -> "<s>".
        where: what the template is, for messages.

    Raises:
        ValueError: the source is no template.

    Examples:
        >>> source = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{{ eos_token }}{% endfor %}"
        >>> template = ChatTemplate(source=source + "{% if add_generation_prompt %}<assistant>{% endif %}",
        ...                         tokens={"eos_token": "</s>"})
        >>> template.render([{"role": "user", "content": "Hello"}], add_generation_prompt=True)
        '<user>Hello</s><assistant>'
    """

    source: str
    tokens: Mapping[str, str] = field(default_factory=dict)
    where: str = "the chat template"

    def __post_init__(self) -> None:
        try:
            _compiled(self.source)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"{self.where}: line {error.lineno} is no Jinja template: {_sentence(error)}") from None
        except (jinja2.TemplateError, RecursionError, OverflowError) as error:
            raise ValueError(f"{self.where} is no Jinja template: {_sentence(error)}") from None

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = False, **variables: Any
    ) -> str:
        """The conversation as text, special tokens written out.

        Args:
            messages: the turns, each with a "role" and, as a rule, a "content".
            add_generation_prompt: whether the beginning of the assistant's next turn stands at the end.
            **variables: more names that the template may use, such as `tools`; they go before all others.

        Raises:
            ValueError: the messages are no list of objects that each have a role, or the template refuses them or fails.
        """
        if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
            raise ValueError(f"messages: wanted a list of objects, got {type(messages).__name__}")
        for number, message in enumerate(messages):
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise ValueError(f'messages.{number}: wanted an object with a "role" that is text')
        known = {"tools": None, "documents": None, **self.tokens, "add_generation_prompt": add_generation_prompt}
        try:
            return _compiled(self.source).render({**known, **variables, "messages": messages})
        except Exception as error:  # whatever the template makes of the messages, it is the template that fails
            raise ValueError(f"{self.where} cannot render the messages: {_sentence(error)}") from None


def load_chat_template(folder: Path) -> ChatTemplate | None:
    """The chat template of a folder, as Hugging Face lays it out.

    It is chat_template.jinja, else "chat_template" in tokenizer_config.json: a text, or a list of named ones, of which
    "default" is taken. Special tokens are those that tokenizer_config.json names.

    Args:
        folder: of a model or a tokenizer.

    Returns:
        The template; None where the folder has none.

    Raises:
        ValueError: a file cannot be read, or holds no template.
    """
    folder = Path(folder)
    source, tokens, where = None, {}, folder / TEMPLATE
    if (folder / TOKENIZER_CONFIG).is_file():
        table = _table(folder / TOKENIZER_CONFIG)
        tokens = {name: text for name in _TOKENS if (text := _token(table.get(name))) is not None}
        source = _default(table.get("chat_template"), folder / TOKENIZER_CONFIG)
    if where.is_file():
        source = _text(where)
    else:
        where = folder / TOKENIZER_CONFIG
    return None if source is None else ChatTemplate(source=source, tokens=tokens, where=f"the chat template of {where}")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as text: {_sentence(error)}") from None


def _table(path: Path) -> Mapping[str, Any]:
    try:
        table = json.loads(_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {_sentence(error)}") from None
    if not isinstance(table, dict):
        raise ValueError(f"{path} is not a JSON object")
    return table


def _token(value: Any) -> str | None:
    """A special token: a text, or an object whose content it is."""
    text = value.get("content") if isinstance(value, Mapping) else value
    return text if isinstance(text, str) else None


def _default(value: Any, where: Path) -> str | None:
    """The template among what tokenizer_config.json calls "chat_template"."""
    if value is None or isinstance(value, str):
        return value
    entries = value if isinstance(value, list) else None
    if entries is None or not all(isinstance(entry, Mapping) for entry in entries):
        raise ValueError(f'{where}: "chat_template" should be a text, or a list of objects with "name" and "template"')
    named = {entry.get("name"): entry.get("template") for entry in entries}
    source = named.get("default")
    if not isinstance(source, str):
        raise ValueError(
            f'{where}: "chat_template" has none called "default", only {", ".join(map(str, named)) or "none"}'
        )
    return source


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


class _Generation(jinja2.ext.Extension):
    """The tag `generation`, which marks the assistant's words; they are rendered like all others."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_words"), [], [], body).set_lineno(line)

    def _words(self, caller: Callable[[], str]) -> str:
        return caller()


@functools.lru_cache(maxsize=16)
def _compiled(source: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(source)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)
