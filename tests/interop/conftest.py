"""Published checkpoints, as small as they can be, and copies of them to damage."""

import json
import shutil
from pathlib import Path

import pytest

CHECKPOINTS = Path(__file__).parent / "checkpoints"


@pytest.fixture
def checkpoint(tmp_path):
    """A function that copies a checkpoint and changes keys of its config.json; None removes one."""

    def copy(name="qwen3_5_text", **changes):
        folder = tmp_path / name
        shutil.copytree(CHECKPOINTS / name, folder)
        table = json.loads((folder / "config.json").read_text()) | changes
        table = {key: value for key, value in table.items() if key not in changes or value is not None}
        (folder / "config.json").write_text(json.dumps(table))
        return folder

    return copy
