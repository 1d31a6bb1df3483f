"""Groups of parameters with a learning rate or a weight decay of their own, or frozen."""

import re
from collections.abc import Sequence
from typing import Any

import jax

from delta_jax.parallel import path_string
from delta_jax.training.config import ParameterGroup

_SHOWN = 6  # paths in a message


def group_of(groups: Sequence[ParameterGroup], path: str) -> ParameterGroup | None:
    """The first group whose pattern is found in the path, None where there is none."""
    return next((group for group in groups if re.search(group.pattern, path)), None)


def frozen_mask(groups: Sequence[ParameterGroup], parameters: Any) -> Any:
    """True for what is frozen, in a tree of the parameters.

    Raises:
        ValueError: a group has no parameter, because nothing matches its pattern or only what groups before it have.
    """
    paths = [path_string(path) for path, _ in jax.tree_util.tree_leaves_with_path(parameters)]
    owners = [group_of(groups, path) for path in paths]
    for index, group in enumerate(groups):
        if any(owner is group for owner in owners):
            continue
        matched = [path for path in paths if re.search(group.pattern, path)]
        found = matched or paths
        shown = ", ".join(found[:: max(1, len(found) // _SHOWN)][:_SHOWN])
        why = "only parameters of groups before it" if matched else "no parameter; there are"
        raise ValueError(f"optimizer.groups.{index}: the pattern {group.pattern!r} matches {why}: {shown}")
    frozen = [owner is not None and owner.frozen for owner in owners]
    if all(frozen):
        raise ValueError("optimizer.groups: all parameters are frozen, and nothing is left to train")
    return jax.tree.unflatten(jax.tree.structure(parameters), frozen)
