"""The notebooks of docs/notebooks run, with small sizes in place of a laptop's."""

import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any

import jax
import matplotlib
import numpy as np
import pytest

NOTEBOOKS = Path(__file__).parents[1] / "docs" / "notebooks"
LAYER = "WIDTH, HEADS, BATCH, LENGTH, STEPS, VOCABULARY = 16, 2, 8, 12, 3, 8"
TRACKING = "STEPS, BATCH, TRAINED, TESTED, WIDTH, SEQUENCES = 30, 8, 12, 20, 8, 8"


def run(name: str, sizes: str | None) -> tuple[dict[str, Any], str]:
    """The names that a notebook leaves and what it prints; `sizes` takes the place of the line that sets the same names."""
    cells = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    if sizes is not None:
        names = sizes.partition(" = ")[0]
        changed = [re.subn(rf"^{names} = .*$", sizes, cell, flags=re.MULTILINE) for cell in code]
        assert sum(count for _, count in changed) == 1, f"{name} does not set {names} in one line"
        code = [cell for cell, _ in changed]
    scope: dict[str, Any] = {"__name__": "__main__"}
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        for number, cell in enumerate(code):
            exec(compile(cell, f"{name}.ipynb, code cell {number}", "exec"), scope)
    return scope, said.getvalue()


@pytest.fixture(autouse=True)
def as_in_a_notebook() -> Any:
    """Pictures are not shown, and dtypes and ranks are promoted as users have it."""
    import matplotlib.pyplot as plt

    matplotlib.use("agg")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
    plt.close("all")


def test_the_op_and_its_members() -> None:
    scope, said = run("op", None)
    assert {o.shape for o, _ in scope["outputs"].values()} == {(1, 40, 2, 8)}
    np.testing.assert_allclose(scope["rows"]["the delta rule"][3][0], [-2.0, 0.0, 2.0])
    np.testing.assert_allclose(scope["rows"]["without the erase"][3][0], [-1.0, 2.0, 5.0])
    assert "no decay" in said


def test_a_layer_in_a_model_of_ones_own() -> None:
    """On the eight devices of the tests: the mesh gives the first losses of one device."""
    scope, _ = run("layer", LAYER)
    assert dict(scope["mesh"].shape) == {"data": 2, "fsdp": 2, "sequence": 1, "tensor": 2}
    np.testing.assert_allclose(scope["losses_on_mesh"], scope["losses"], atol=1e-3)
    assert scope["losses"][-1] < scope["losses"][0]


def test_state_tracking() -> None:
    scope, said = run("state_tracking", TRACKING)
    assert {values.shape for values in scope["accuracy"].values()} == {(20,)}
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+) ", said)]
    assert len(losses) == 2 and max(losses) < 0.9  # of three tokens one is never the answer, which is learnt at once
