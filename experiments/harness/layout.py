"""What a file of results must hold, so that one that does not is named before anything reads it."""

from collections.abc import Mapping
from typing import Any

__all__ = ["NUMBER", "TRAINED", "misfit"]

NUMBER = (int, float)
LOSS = (int, float, type(None))
"""None where it was not finite."""

SCORES = {"token": NUMBER, "sequence": NUMBER, "macro": NUMBER, "loss": LOSS, "bits": LOSS}
CURVE = {"position": [int], "token": [NUMBER]}

TRAINED: dict[str, Any] = {
    "study": str,
    "scale": str,
    "cell": str,
    "arm": str,
    "order": int,
    "date": str,
    "versions": {"jax": str},
    "machine": {"device": str, "platform": str, "cores": int},
    "parameters": int,
    "tokens": int,
    "seconds": NUMBER,
    "cpu_seconds": NUMBER,
    "runs": [
        {
            "learning_rate": NUMBER,
            "seed": int,
            "tests": {str: SCORES | {"curve?": CURVE}},
            "history": [SCORES | {"step": int}],
        }
    ],
    "config": {
        "metric": str,
        "weight_decay": NUMBER,
        "model": {"hidden_size": int, "num_layers": int},
        "task": {"task": str},
        "tests": {str: {"task": str}},
        "sweep": {
            "learning_rates": [NUMBER],
            "seeds": [int],
            "steps": int,
            "batch_size": int,
            "test_examples": int,
            "train_examples": (int, type(None)),
            "stop_at": LOSS,
        },
    },
}
"""A group of runs, see `train_group`."""


def misfit(found: Any, layout: Any, key: str = "") -> str | None:
    """What is wrong with a JSON value, in words that name the dotted key; None where nothing is.

    Args:
        found: the value.
        layout: a type, or a tuple of them; a list with the layout of its entries, of which there must be one; a mapping
            from keys to layouts, where `str` is any key, and "key?" may be missing; or the value itself. Values may have
            more keys.
        key: where the value stands.
    """
    if isinstance(layout, list):
        if not isinstance(found, list) or not found:
            return f"{key} should be a list that holds something"
        parts = [(f"{key}.{index}", item, layout[0]) for index, item in enumerate(found)]
    elif isinstance(layout, Mapping):
        if not isinstance(found, Mapping) or not found:
            return f"{key or 'it'} should be a table that holds something"
        prefix, parts = f"{key}." if key else "", []
        for name, inner in layout.items():
            if name is str:
                parts += [(prefix + other, item, inner) for other, item in found.items()]
            elif name.rstrip("?") in found:
                parts.append((prefix + name.rstrip("?"), found[name.rstrip("?")], inner))
            elif not name.endswith("?"):
                return f"{prefix}{name} is missing"
    elif isinstance(layout, type | tuple):
        kinds = layout if isinstance(layout, tuple) else (layout,)
        fits = isinstance(found, kinds) and (bool in kinds or not isinstance(found, bool))
        return None if fits else f"{key} should be {' or '.join(kind.__name__ for kind in kinds)}, and is {found!r:.40}"
    else:
        return None if found == layout else f"{key} should be {layout!r}, and is {found!r:.40}"
    return next((words for words in (misfit(item, inner, place) for place, item, inner in parts) if words), None)
