"""Checks of the options of a layer; their messages name the option and what was wanted."""

from typing import Any

__all__ = ["require_flags", "require_positive_integers", "require_positive_numbers"]


def require_positive_integers(**numbers: Any) -> None:
    """Raises a ValueError if one is neither a positive integer nor None."""
    for name, number in numbers.items():
        if number is not None and (not isinstance(number, int) or isinstance(number, bool) or number < 1):
            raise ValueError(f"{name} must be a positive integer, got {number!r}")


def require_positive_numbers(**numbers: Any) -> None:
    """Raises a ValueError if one is not a positive number."""
    for name, number in numbers.items():
        if not isinstance(number, int | float) or isinstance(number, bool) or not number > 0:
            raise ValueError(f"{name} must be a positive number, got {number!r}")


def require_flags(**flags: Any) -> None:
    """Raises a ValueError if one is not a boolean."""
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise ValueError(f"{name} must be true or false, got {flag!r}")
