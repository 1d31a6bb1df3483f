"""What a signal does: answered at once, whatever is at work; what is done is saved; nothing untrue is said."""

import hashlib
import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from training_runs import finish, losses, start

from delta_jax.training.signals import StopRequest

Table = Callable[..., dict[str, Any]]


def _compute() -> float:
    """Half a second or more in which Python runs no handler; returns when it was over."""
    hashlib.pbkdf2_hmac("sha256", b"a", b"b", 1_000_000)
    return time.monotonic()


def _send(*numbers: int) -> None:
    def send() -> None:
        for number in numbers:
            time.sleep(0.1)
            os.kill(os.getpid(), number)

    threading.Thread(target=send).start()


def test_a_signal_is_answered_while_the_main_thread_computes() -> None:
    told: list[tuple[str, bool, float]] = []
    before = [signal.getsignal(number) for number in StopRequest.SIGNALS]
    with StopRequest(lambda name, again: told.append((name, again, time.monotonic()))) as stop:
        _send(signal.SIGTERM)
        over = _compute()
    ((name, again, when),) = told
    assert (name, again, stop.requested) == ("SIGTERM", False, True)
    assert when < over
    assert [signal.getsignal(number) for number in StopRequest.SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_a_second_signal_acts_as_it_always_does() -> None:
    told: list[tuple[str, bool]] = []

    def compute() -> None:
        with StopRequest(lambda *what: told.append(what)):
            _send(signal.SIGINT, signal.SIGINT)
            _compute()
            time.sleep(1)

    with pytest.raises(KeyboardInterrupt):
        compute()
    assert told == [("SIGINT", False), ("SIGINT", True)]


def test_a_hangup_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.05)
        assert not stop.requested
    finally:
        signal.signal(signal.SIGHUP, before)


def _read_until(process: subprocess.Popen[str], text: str) -> str:
    """What a process prints up to the line with a text; it is ended if there is none within two minutes."""
    assert process.stdout is not None
    said, watch = "", threading.Timer(120, process.kill)
    watch.start()
    for line in process.stdout:
        said += line
        if text in line:
            watch.cancel()
            return said
    raise AssertionError(f"{text!r} was never said, but: {said}")


def _close(process: subprocess.Popen[str]) -> None:
    """Read no more of what a process prints."""
    for stream in (process.stdout, process.stderr):
        assert stream is not None
        stream.close()


@pytest.fixture
def long_evaluation(table: Table, tmp_path: Path) -> dict[str, Any]:
    """A run whose evaluations take minutes."""
    corpus = tmp_path / "long"
    corpus.mkdir()
    for index in range(2):
        (corpus / f"{index}.txt").write_text(f"some words and {index} more " * 250_000)
    return table(data={"path": str(corpus), "shuffle_rows": 16, "validation_fraction": 1e-6}, evaluation_batches=None)


@pytest.mark.slow
def test_the_first_evaluation_is_interrupted(long_evaluation: dict[str, Any], cache: Path) -> None:
    process, output = start(long_evaluation, cache), Path(long_evaluation["output"])
    _read_until(process, "compiling the evaluation step")
    time.sleep(3)
    begin = time.monotonic()
    process.send_signal(signal.SIGINT)
    said = _read_until(process, "SIGINT: stopping")
    assert time.monotonic() - begin < 1
    assert "in the middle of this evaluation" in said and "everything is lost then" in said
    code, out, err = finish(process)
    assert time.monotonic() - begin < 5
    assert (code, err) == (0, "")
    assert "stopped before the first step: there is nothing to save, the next start begins anew" in out
    assert "saved in" not in out
    assert not list((output / "checkpoints").iterdir())
    assert (output / "evaluation.jsonl").read_text() == ""


SLOWLY = """
import dataclasses, time
from delta_jax.training import loop
set_up = loop.set_up
def set_up_slow(*arguments):
    setup = set_up(*arguments)
    step = setup.evaluation_step
    return dataclasses.replace(setup, evaluation_step=lambda *inputs: time.sleep(1) or step(*inputs))
loop.set_up = set_up_slow
"""


@pytest.mark.slow
def test_a_later_evaluation_is_interrupted_and_made_again(uninterrupted: Path, table: Table, cache: Path) -> None:
    changed = table(checkpoint={"every": 1000})
    process, output = start(changed, cache, prepare=SLOWLY), Path(changed["output"])
    while not (output / "metrics.jsonl").exists() or len(losses(output)) < 20:
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    code, out, err = finish(process)
    assert (code, err) == (0, "")
    assert "SIGTERM: stopping in the middle of this evaluation" in out
    assert f"stopped after step 20, saved in {output}" in out
    code, out, err = finish(start(changed, cache))
    assert (code, err) == (0, "")
    assert losses(output) == losses(uninterrupted)
    assert (output / "evaluation.jsonl").read_text() == (uninterrupted / "evaluation.jsonl").read_text()


@pytest.mark.slow
def test_a_second_signal_ends_it_without_saving(long_evaluation: dict[str, Any], cache: Path) -> None:
    process = start({**long_evaluation, "steps": 100_000, "evaluation_batches": 1}, cache)
    _read_until(process, "step 1/100000")
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    code, out, _ = finish(process)
    if code:  # else it had stopped, and saved, before the second came
        assert code == -signal.SIGTERM
        assert "SIGTERM again: stopping without saving, everything is lost" in out
        assert "saved in" not in out


@pytest.mark.slow
def test_a_terminal_that_is_closed(table: Table, cache: Path) -> None:
    """SIGHUP, and nobody reads any more: what is done is saved all the same."""
    changed = table(checkpoint={"every": 1000}, steps=100_000)
    process, output = start(changed, cache), Path(changed["output"])
    _read_until(process, "step 1/100000")
    _close(process)
    process.send_signal(signal.SIGHUP)
    process.wait(timeout=60)
    assert [int(path.name) for path in (output / "checkpoints").iterdir()] == [losses(output)[-1][0]]


@pytest.mark.slow
def test_nobody_reads(table: Table, cache: Path, uninterrupted: Path) -> None:
    process, output = start(table(), cache), Path(table()["output"])
    _read_until(process, "compiling the evaluation step")
    _close(process)
    process.wait(timeout=120)
    assert losses(output) == losses(uninterrupted)


@pytest.mark.slow
def test_on_a_terminal(table: Table, cache: Path) -> None:
    """A bar, and above it the same sentences."""
    master, slave = pty.openpty()
    changed = table(checkpoint={"every": 1000}, steps=100_000)
    process = start(changed, cache, stdout=slave, TERM="xterm", COLUMNS="100")
    os.close(slave)
    said = b""
    while b"1/100000" not in said.replace(b"\x1b", b""):
        said += os.read(master, 4096)
    process.send_signal(signal.SIGINT)
    try:
        while part := os.read(master, 4096):
            said += part
    except OSError:  # the other end is closed
        pass
    os.close(master)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    for text in (
        b"parameters on 1 cpu device(s)",
        b"SIGINT: stopping after the step at work",
        b"saved in",
        b"\xe2\x94\x81",
    ):
        assert text in said


@pytest.mark.slow
def test_the_command_line_says_one_sentence_when_a_document_is_broken(tmp_path: Path, cache: Path) -> None:
    lines = [json.dumps({"text": f"document {index} " * 100}) for index in range(60)]
    lines[41] = lines[41][:-1]
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines) + "\n")
    model = ("hidden_size=16", "num_layers=1", "intermediate_size=16", "pattern.0.head_dim=8")
    data = ("data.path=corpus.jsonl", "data.shuffle_rows=4", "evaluation_batches=1", "sequence_length=32", "output=run")
    command = [sys.executable, "-m", "delta_jax.cli", "train", "tiny", *(f"model.{one}" for one in model), *data]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[2]), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert done.stderr.startswith("delta-jax train: error: ") and done.stderr.count("\n") == 1
    assert "corpus.jsonl" in done.stderr
    steps = losses(tmp_path / "run")[-1][0]
    assert f"stopped by a fault of the data after step {steps}, saved in run" in done.stdout
    assert (tmp_path / "run" / "checkpoints" / str(steps)).is_dir()
