"""A sweep killed with kill -9 goes on where it stopped and ends with the same results."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
STEPS = 30
FIRST, SECOND = "short.rotary.json", "short.no_positions.json"


def _start(folder: Path, cache: Path, *arguments: str) -> subprocess.Popen[str]:
    arguments = ("--output", "results", 'cells=["short"]', f"steps={STEPS}", "checkpoint_minutes=0", *arguments)
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("tiny_study.py")), *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _results(folder: Path) -> dict[str, Any]:
    """Of the second architecture, without what may differ: times, and how it was called."""
    table = json.loads((folder / "results" / SECOND).read_text())
    return {key: table[key] for key in ("study", "cell", "arm", "parameters", "tokens", "runs", "config")}


def _saved(folder: Path) -> int:
    """The step of the newest checkpoint of the group at work."""
    names = (path.name for path in folder.glob("runs/experiments/unfinished/*/checkpoints/*"))
    return max((int(name) for name in names if name.isdecimal()), default=0)


@pytest.mark.slow
def test_kill_minus_nine(tmp_path: Path) -> None:
    whole, killed, cache = (tmp_path / name for name in ("whole", "killed", "cache"))
    for folder in (whole, killed):
        folder.mkdir()
    process = _start(whole, cache, 'arms=["no positions"]')
    _, error = process.communicate(timeout=500)
    assert process.returncode == 0, error

    process, deadline = _start(killed, cache), time.monotonic() + 500
    first = killed / "results" / FIRST
    while not (first.exists() and 8 <= _saved(killed) < STEPS - 5):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (killed / "results" / SECOND).exists(), "killed too late to show anything"
    written = first.stat().st_mtime_ns

    process = _start(killed, cache)
    output, error = process.communicate(timeout=500)
    assert process.returncode == 0, error
    assert "2 groups of runs, 1 done before" in output
    progress = next(line for line in output.splitlines() if line.startswith("short.no_positions"))
    assert int(progress.split()[1].split("/")[0]) > 5, "the first evaluation, at step 5, was before the kill"
    assert first.stat().st_mtime_ns == written
    assert _results(killed) == _results(whole)
    assert not _saved(killed)
