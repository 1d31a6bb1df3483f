"""A model so small that a run takes seconds, and runs in processes of their own that can be killed."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from delta_jax.config import described, load_config
from delta_jax.models import LanguageModel
from delta_jax.training import TrainConfig

SCRIPT = """
import json, sys, warnings
import jax
jax.config.update("jax_platforms", "cpu")
from delta_jax.config import load_config
from delta_jax.training import TrainConfig, train
if __name__ == "__main__":
    result = train(load_config(TrainConfig, json.loads(sys.argv[1])))
    print("interrupted" if result.interrupted else "finished", result.step)
"""


def run_table(corpus: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """The table of a tiny run; keywords replace top-level keys."""
    return {
        "steps": 40,
        "batch_size": 4,
        "sequence_length": 32,
        "log_every": 1,
        "evaluate_every": 20,
        "evaluation_batches": 2,
        "output": str(output),
        "model": {
            "vocab_size": 264,
            "hidden_size": 16,
            "num_layers": 2,
            "intermediate_size": 32,
            "dtype": "float32",
            "pattern": [{"mixer": "delta_net", "num_heads": 2, "head_dim": 8, "implementation": "recurrent"}],
        },
        "data": {"path": str(corpus), "validation_fraction": 0.1, "shuffle_rows": 16},
        "optimizer": {"learning_rate": 0.01, "warmup_steps": 4},
        "checkpoint": {"every": 5, "keep_last": 3},
        **changes,
    }


COMMAND = """
import sys
from delta_jax.cli import main
sys.exit(main(sys.argv[1:]))
"""


def start(
    table: dict[str, Any], cache: Path, *, prepare: str = "", stdout: int = subprocess.PIPE, **environ: str
) -> subprocess.Popen[str]:
    """Train in a process of its own, on one CPU device; `prepare` is Python to run before."""
    return _run([prepare + SCRIPT, json.dumps(table)], cache, stdout, environ)


def start_several(
    count: int, table: dict[str, Any], cache: Path, *flags: str, prepare: str = ""
) -> list[subprocess.Popen[str]]:
    """Train in several processes by the command line, each with one CPU device."""
    config = Path(table["output"]).with_suffix(".toml")
    config.write_text(described(load_config(TrainConfig, table)))
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    who = ["--coordinator", f"localhost:{port}", "--processes", str(count), *flags]
    command = [prepare + COMMAND, "train", str(config), *who]
    environ = {"JAX_PLATFORMS": "cpu"}
    return [_run([*command, "--process", str(index)], cache, subprocess.PIPE, environ) for index in range(count)]


def _run(arguments: list[str], cache: Path, stdout: int, environ: dict[str, str]) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {
        **environ,
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    return subprocess.Popen(
        [sys.executable, "-c", *arguments],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def wait_for_step(output: Path, step: int, *at_work: subprocess.Popen[str]) -> None:
    """Return when a step stands in metrics.jsonl; none of the processes may end before."""
    metrics, deadline = output / "metrics.jsonl", time.monotonic() + 240
    while not metrics.exists() or metrics.read_text().count("\n") < step:
        ended = [finish(process) for process in at_work if process.poll() is not None]
        assert not ended, f"ended before step {step}: {ended}"
        assert time.monotonic() < deadline, f"step {step} was not reached"
        time.sleep(0.002)


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Return code, standard output and standard error."""
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


@contextlib.contextmanager
def counted_traces() -> Iterator[Counter[str]]:
    """How often meanwhile a model is built ("__init__") and its layers are traced ("features_and_loads")."""
    counts: Counter[str] = Counter()

    def counting(name: str) -> Callable[..., Any]:
        method = getattr(LanguageModel, name)

        def counted(*arguments: Any, **keywords: Any) -> Any:
            counts[name] += 1
            return method(*arguments, **keywords)

        return counted

    with pytest.MonkeyPatch.context() as patch:
        for name in ("__init__", "features_and_loads"):
            patch.setattr(LanguageModel, name, counting(name))
        yield counts


def losses(output: Path) -> list[tuple[int, float, float]]:
    """What must not change by an interruption: step, loss and gradient norm of every line."""
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [(line["step"], line["loss"], line["gradient_norm"]) for line in map(json.loads, lines)]
