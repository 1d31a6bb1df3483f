"""The demo from top to bottom, shrunk to seconds."""

import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]


def test_demo_trains_measures_and_samples(tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(10):
        (corpus / f"{number}.txt").write_text(f"def f{number}(x):\n    return x + {number}\n" * 20)
    overrides = {
        "data.path": corpus,
        "output": tmp_path / "run",
        "steps": 30,
        "batch_size": 4,
        "sequence_length": 64,
        "model.num_layers": 1,
        "model.hidden_size": 32,
        "model.intermediate_size": 64,
        "optimizer.warmup_steps": 2,
        "optimizer.learning_rate": 0.01,
    }
    command = [
        sys.executable,
        "-m",
        "experiments.demo",
        *(f"{key}={value}" for key, value in overrides.items()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    measured = dict(re.findall(r"(before training|bigram|after training)\D*(\d+\.\d{3})", done.stdout))
    assert 7.5 < float(measured["before training"]) < 8.6
    assert 0.5 < float(measured["bigram"]) < 4.0
    assert float(measured["after training"]) < float(measured["before training"]) - 2.0
    assert "class Stack:" in done.stdout
    assert (tmp_path / "run" / "curve.png").stat().st_size > 1000


def test_demo_reports_a_mistake_in_one_line():
    command = [sys.executable, "-m", "experiments.demo", "model.hidden_sise=1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr.startswith("demo: ")
    assert "model.hidden_sise" in done.stderr
    assert done.stderr.count("\n") == 1
