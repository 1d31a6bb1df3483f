"""Typed configuration: TOML files and ``a.b.c=value`` overrides into nested frozen dataclasses, and back."""

import dataclasses
import difflib
import functools
import inspect
import json
import math
import re
import textwrap
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin


def load_config[Config](
    cls: type[Config], source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()
) -> Config:
    """Read a dataclass from a preset, a TOML file or a mapping, after applying ``a.b.c=value`` overrides.

    Values of overrides are read as TOML (``true``, ``3e-4``, ``[1, 2]``); what is not TOML is a string,
    ``null`` is None. Digits reach into arrays: ``model.pattern.0.num_heads=4``. A dataclass that defines a
    class method ``from_dict(table)`` (and ``to_dict``) chooses its own form as a table.

    Args:
        cls: the dataclass to build.
        source: name of a preset (see ``preset_names``), path of a TOML file, or the table itself.
        overrides: assignments, applied in order.

    Returns:
        An instance of ``cls``.

    Raises:
        ValueError: the preset or the file does not exist, the TOML is malformed, a key is unknown or
            missing, or a value has the wrong type; the message names the dotted key.
    """
    table: dict[str, Any] = _copy(source) if isinstance(source, Mapping) else _read(source)
    for override in overrides:
        _apply_override(table, override)
    result: Config = _build(cls, table, "")
    return result


def to_dict(config: Any) -> dict[str, Any]:
    """The table a dataclass came from: JSON-able, and accepted by ``load_config`` again."""
    result = _plain(config)
    if not isinstance(result, dict):
        raise ValueError(f"to_dict wants a dataclass, got {type(config).__name__}")
    return result


def described(config: Any) -> str:
    """A configuration as a TOML file, which ``load_config`` reads again, with the meaning of every key above it.

    What a key means is what the docstring of its dataclass says. Keys that are null, which TOML has not, are comments.
    """
    return "\n".join(_described(config, "")) + "\n"


def _described(config: Any, path: str) -> list[str]:
    table = config.to_dict() if hasattr(config, "to_dict") else vars(config)
    meanings = config.meanings() if hasattr(config, "meanings") else meanings_of(type(config))
    lines: list[str] = []
    inner: list[str] = []
    for name, value in table.items():
        where, entries = f"{path}{name}", value if isinstance(value, tuple | list) else ()
        meaning = textwrap.wrap(meanings.get(name, ""), 116, initial_indent="# ", subsequent_indent="# ")
        if dataclasses.is_dataclass(value):
            inner += ["", *meaning, f"[{where}]", *_described(value, f"{where}.")]
        elif entries and dataclasses.is_dataclass(entries[0]):
            for number, entry in enumerate(entries):
                inner += ["", *(meaning if number == 0 else ()), f"[[{where}]]", *_described(entry, f"{where}.")]
        else:
            plain = _plain(value)
            lines += [*meaning, f"# {name} = null" if plain is None else f"{name} = {json.dumps(plain)}"]
    return lines + inner


def meanings_of(cls: type) -> dict[str, str]:
    """What the docstring of a class says of its attributes or arguments."""
    doc, found = inspect.cleandoc(cls.__doc__ or ""), dict[str, str]()
    for section in re.findall(r"^(?:Attributes|Args):\n(.*?)(?:\n\n|\Z)", doc, re.DOTALL | re.MULTILINE):
        for names, text in re.findall(r"^ {4}([\w, ]+): (.*?)(?=^ {4}\S|\Z)", section, re.DOTALL | re.MULTILINE):
            found |= dict.fromkeys(names.split(", "), " ".join(text.split()))
    return found


def preset_names() -> tuple[str, ...]:
    """Names of the presets that come with the package, sorted."""
    return tuple(sorted(path.stem for path in _preset_folder().glob("*.toml")))


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The dotted keys in which two tables from ``to_dict`` differ -> both values, "absent" where there is none."""
    flat_old, flat_new = _flatten(old), _flatten(new)
    keys = [*flat_old, *(key for key in flat_new if key not in flat_old)]
    return {
        key: (flat_old.get(key, "absent"), flat_new.get(key, "absent"))
        for key in keys
        if flat_old.get(key, dataclasses.MISSING) != flat_new.get(key, dataclasses.MISSING)
    }


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """One line ``key: old, new`` for each dotted key in which two tables differ.

    Args:
        old: a table from ``to_dict``.
        new: the other table.

    Returns:
        Lines in the order of the keys; empty when the tables are equal.
    """
    return [f"{key}: {there!r} there, {here!r} here" for key, (there, here) in changes(old, new).items()]


def _preset_folder() -> Path:
    installed = Path(__file__).parent / "configs"
    return installed if installed.is_dir() else Path(__file__).parent.parent / "configs"


def _read(source: str | Path) -> dict[str, Any]:
    path = Path(source)
    if not path.is_file():
        if path.suffix == ".toml" or len(path.parts) != 1:
            raise ValueError(f'configuration file "{source}" does not exist')
        path = _preset_folder() / f"{source}.toml"
        if not path.is_file():
            hint = did_you_mean(str(source), preset_names())
            raise ValueError(f'unknown preset "{source}"{hint}; there are: {", ".join(preset_names())}')
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f'configuration file "{path}" is not valid TOML: {error}') from error


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list | tuple) else value


def _apply_override(table: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ValueError(f'override "{override}" should read a.b.c=value')
    node: Any = table
    for depth, part in enumerate(parts):
        where = ".".join(parts[: depth + 1])
        index: Any = part
        if isinstance(node, list):
            if not part.isdecimal() or int(part) >= len(node):
                raise ValueError(f"{where}: there is no such entry, the array has {len(node)} (numbered from 0)")
            index = int(part)
        elif not isinstance(node, dict):
            raise ValueError(f"{'.'.join(parts[:depth])} is a value, not a table: {where} cannot be set")
        if depth == len(parts) - 1:
            node[index] = _parse(text.strip())
        else:
            node = node.setdefault(index, {}) if isinstance(node, dict) else node[index]


def _parse(text: str) -> Any:
    if text == "null":
        return None
    try:
        table = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):  # not TOML, or a number or a nesting without end
        return text
    return table["value"] if len(table) == 1 else text


@functools.cache
def _type_hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _build(cls: type, table: Any, key: str) -> Any:
    if not isinstance(table, Mapping):
        raise _wrong_type(key, "a table", table)
    if hasattr(cls, "from_dict"):
        return _construct(cls.from_dict, key, table)
    return from_fields(cls, table, key)


def from_fields(cls: type, table: Mapping[str, Any], key: str = "") -> Any:
    """A dataclass whose table has its fields as keys; what a ``from_dict`` that only completes the table ends with.

    Raises:
        ValueError: see ``load_config``; keys are called by their place below ``key``.
    """
    prefix = f"{key}." if key else ""
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    for name in table:
        if name not in fields:
            raise ValueError(f'unknown key "{prefix}{name}"{did_you_mean(name, fields)}; known: {", ".join(fields)}')
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in table:
            raise ValueError(f'missing key "{prefix}{name}"')
    hints = _type_hints(cls)
    return _construct(
        cls, key, **{name: convert(hints[name], value, f"{prefix}{name}") for name, value in table.items()}
    )


def _construct(make: Any, key: str, *arguments: Any, **keywords: Any) -> Any:
    try:
        return make(*arguments, **keywords)
    except ValueError as error:
        raise ValueError(f"{key}: {error}" if key else str(error)) from error


def check_fields(config: Any) -> None:
    """Hold every field of a frozen dataclass to its annotated type, as `load_config` does; for `__post_init__`.

    Raises:
        ValueError: see `convert`.
    """
    cls: type = type(config)
    hints = _type_hints(cls)
    for field in dataclasses.fields(config):
        value = convert(hints[field.name], getattr(config, field.name), field.name)
        object.__setattr__(config, field.name, value)


def convert(hint: Any, value: Any, key: str) -> Any:
    """The value as the annotated type: integers become floats, arrays tuples, tables dataclasses, strings paths.

    Args:
        hint: an annotation; of other kinds than those of configurations nothing is demanded.
        value: as TOML has it.
        key: what the value is called.

    Returns:
        The value.

    Raises:
        ValueError: it is of another type, a number that is not finite or an integer of more than 64 bits; the message
            names the key, the type wanted and the value. True is no number.
    """
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{key}: wanted a finite number, got {value}")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError(f"{key}: wanted a number of at most 64 bits, got one of {value.bit_length()}")
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        if value not in arguments or type(value) not in map(type, arguments):
            hint_text = did_you_mean(str(value), [str(item) for item in arguments])
            raise ValueError(f"{key}: wanted one of {', '.join(map(repr, arguments))}, got {value!r}{hint_text}")
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(arguments, value, key)
    if hint is Any:
        return value
    if hint is None or hint is types.NoneType:
        if value is not None:
            raise _wrong_type(key, "null", value)
        return None
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, typing.cast(type, hint)) else _build(typing.cast(type, hint), value, key)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise _wrong_type(key, "an array", value)
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(convert(arguments[0], item, f"{key}.{index}") for index, item in enumerate(value))
        if len(value) != len(arguments):
            raise _wrong_type(key, f"an array of {len(arguments)}", value)
        return tuple(
            convert(argument, item, f"{key}.{index}")
            for index, (argument, item) in enumerate(zip(arguments, value, strict=True))
        )
    if hint is float and type(value) is int:
        return float(value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if not isinstance(hint, type) or origin is not None:
        return value
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise _wrong_type(key, _NAMES.get(hint, f"a {hint.__name__}"), value)
    return value


def _convert_union(choices: tuple[Any, ...], value: Any, key: str) -> Any:
    if value is None and types.NoneType in choices:
        return None
    real = [choice for choice in choices if choice is not types.NoneType]
    if len(real) == 1:
        return convert(real[0], value, key)
    for choice in sorted(real, key=lambda choice: choice is not type(value)):
        try:
            return convert(choice, value, key)
        except ValueError:
            continue
    raise _wrong_type(key, " or ".join(_NAMES.get(choice, str(choice)) for choice in real), value)


_NAMES = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}


def _wrong_type(key: str, wanted: str, value: Any) -> ValueError:
    shown = repr(value)
    shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
    return ValueError(f"{key or 'configuration'}: wanted {wanted}, got {shown} ({type(value).__name__})")


# What was called otherwise once -> its name now, which helps where that is known, and what there is to say of it.
RENAMED = {
    "key_dim": "qk_nope_head_dim",
    "latent_size": "kv_lora_rank",
    "mamba_2": "mamba2",
    "mlp_size": "intermediate_size",
    "num_dense_layers": "dense_layers, an array of the layers' numbers",
    "number": "num_experts",
    "per_token": "num_experts_per_token",
    "placed": "layer_overrides",
    "ret_net": "retnet",
    "scale": "routed_scaling_factor",
    "shared_key_dim": "qk_rope_head_dim",
    "shared_size": "shared_expert_size",
    "size": "expert_size",
    "use_shared_gate": "use_shared_expert_gate",
    "value_dim": "v_head_dim",
}


def did_you_mean(name: str, known: Any) -> str:
    """What is meant by a name that is not known: what it is called now, or those that are near; "" where nothing is."""
    now = RENAMED.get(name, "")
    if now.partition(",")[0] in known:
        return f" (it is now called {now})"
    near = difflib.get_close_matches(name, list(known), n=2, cutoff=0.6)
    return f" (did you mean {' or '.join(near)}?)" if near else ""


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        if hasattr(value, "to_dict"):
            return _plain(value.to_dict())
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value) if field.init}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _flatten(value: Any, key: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping):
        items = [(str(name), item) for name, item in value.items()]
    elif isinstance(value, list | tuple):
        items = [(str(index), item) for index, item in enumerate(value)]
    else:
        return {key: value}
    flat: dict[str, Any] = {}
    for name, item in items:
        flat |= _flatten(item, f"{key}.{name}" if key else name)
    return flat
