"""What a text begins with when a model is to score it: by what a published tokenizer says, else as in training."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from delta_jax.data import JsonTokenizer, Tokenizer

__all__ = ["Conventions", "conventions"]

_TOKENIZER_CONFIG = "tokenizer_config.json"
_GENERATION_CONFIG = "generation_config.json"


class Conventions(NamedTuple):
    """Special tokens around a text.

    Attributes:
        prefix_id: what stands before a text that follows nothing.
        eos_id: what ends a text.
        begins: whether a text that follows something, a context, begins with the prefix as well.
    """

    prefix_id: int
    eos_id: int
    begins: bool


def conventions(tokenizer: Tokenizer, path: str | Path) -> Conventions:
    """The conventions of a tokenizer, from what lies beside its tokenizer.json as Hugging Face lays it out.

    The prefix is bos if tokenizer_config.json has one, else its eos; without that file, those of generation_config.json. A
    context begins with bos if "add_bos_token" says so, else if the post-processor of tokenizer.json puts it there. Without
    either file, and for bytes, the model was trained here: every document began with the document id, and so do contexts.

    Args:
        tokenizer: the tokenizer.
        path: of its tokenizer.json; "bytes" for bytes.

    Raises:
        ValueError: a file is not JSON, or names a token that is not one of the tokenizer's.
    """
    document, folder = tokenizer.document_id, Path(path).parent
    if not isinstance(tokenizer, JsonTokenizer):
        return Conventions(document, document, True)
    table, generation = _table(folder / _TOKENIZER_CONFIG), _table(folder / _GENERATION_CONFIG)
    if table is not None:
        bos, eos = (_written(tokenizer, table, name, folder / _TOKENIZER_CONFIG) for name in ("bos_token", "eos_token"))
    elif generation is not None:
        named = (generation.get(name) for name in ("bos_token_id", "eos_token_id"))
        bos, eos = (
            _checked(tokenizer, one[0] if isinstance(one, list) and one else one, folder / _GENERATION_CONFIG)
            for one in named
        )
    else:
        return Conventions(document, document, True)
    eos_id = document if eos is None else eos
    told = None if table is None else table.get("add_bos_token")
    begins = bos is not None and (told if isinstance(told, bool) else _post_processor(path) == bos)
    return Conventions(eos_id if bos is None else bos, eos_id, begins)


def _table(path: Path) -> Mapping[str, Any] | None:
    if not path.is_file():
        return None
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(table, dict):
        raise ValueError(f"{path} is not a JSON object")
    return table


def _written(tokenizer: JsonTokenizer, table: Mapping[str, Any], name: str, path: Path) -> int | None:
    """The id of a token that is named by its text, or by an object whose content that is."""
    value = table.get(name)
    text = value.get("content") if isinstance(value, Mapping) else value
    if not isinstance(text, str) or not text:
        return None
    ids = tokenizer.encode_special(text)[0].tolist()
    if len(ids) != 1:
        raise ValueError(f'{path}: "{name}" is {text!r}, which is no token of the tokenizer.json beside it')
    return int(ids[0])


def _checked(tokenizer: Tokenizer, token: Any, path: Path) -> int | None:
    if token is None or (isinstance(token, list) and not token):
        return None
    if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < tokenizer.vocab_size:
        raise ValueError(f"{path}: wanted tokens of [0, {tokenizer.vocab_size}), got {token!r}")
    return token


def _post_processor(path: str | Path) -> int | None:
    """The special token that a tokenizer.json puts before a text."""
    import tokenizers

    ids = tokenizers.Tokenizer.from_file(str(path)).encode("").ids
    return int(ids[0]) if ids else None
