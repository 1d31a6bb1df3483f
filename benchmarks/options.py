"""Values on the command lines of the benchmarks, checked before anything is measured."""

import argparse
import math
import os
from pathlib import Path

__all__ = ["folder", "number", "seconds"]


def number(text: str) -> int:
    """A whole number of at least one."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"wanted a whole number of at least 1, got {text!r}")
    return int(text)


def seconds(text: str) -> float:
    """A positive number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"wanted a positive number, got {text!r}")
    return value


def folder(text: str) -> Path:
    """A folder that is there, or can be made, and can be written."""
    path = Path(text)
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise argparse.ArgumentTypeError(f"cannot be written: {there}")
    return path
