"""The examples of README and of docs/padding.md run as they are printed."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

README = Path(__file__).parents[1] / "README.md"
PADDING = Path(__file__).parents[1] / "docs" / "padding.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES, ids=["op", "layer", "task"])
def test_example(example: str) -> None:
    scope: dict[str, object] = {}
    exec(compile(example, str(README), "exec"), scope)
    if "state" in scope:
        assert scope["o"].shape == (2, 1000, 4, 64)
        assert scope["state"].shape == (2, 4, 64, 64)
        assert scope["o_t"].shape == (2, 4, 64)
    elif "train" in scope:
        assert scope["train"].inputs.shape == scope["train"].targets.shape == (128, 64)  # type: ignore[attr-defined]
    else:
        assert scope["y"].shape == (2, 100, 256)
        assert scope["y_t"].shape == (2, 1, 256)


def test_the_page_on_padding() -> None:
    """Its examples go on from one another."""
    scope: dict[str, Any] = {}
    for example in re.findall(r"```python\n(.*?)```", PADDING.read_text(), re.DOTALL):
        exec(compile(example, str(PADDING), "exec"), scope)
    np.testing.assert_array_equal(scope["y"][1, 3:], 0.0)
    np.testing.assert_array_equal(scope["y_left"][1, :2], 0.0)
    np.testing.assert_array_equal(scope["cache"].position, [7, 4])
    np.testing.assert_array_equal(scope["state"].shape, [2, 1, 8, 32])
    np.testing.assert_array_equal(np.abs(scope["states"]).sum(axis=(2, 3, 4)) > 0, [[True, True, False]] * 2)
