"""The examples of README run as they are printed."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
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
