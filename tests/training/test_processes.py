"""Several processes as one run: the same numbers, one writer, an agreed stop, and an end for all where one is lost."""

import json
import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
import yaml
from training_runs import finish, start_several, wait_for_step

from delta_jax.cli import _parse, main
from delta_jax.config import load_config
from delta_jax.training import CheckpointConfig, TrainConfig, checkpoint, processes, signals, train
from delta_jax.training.metrics import EVALUATION, TRAINING, read_metrics

Table = Callable[..., dict[str, Any]]
Several = Callable[..., list[subprocess.Popen[str]]]

SRUN = {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
KUBERNETES = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}


@pytest.mark.parametrize(
    ("environ", "by"),
    [
        ({}, None),
        (SRUN | {"SLURM_NTASKS": "2"}, "SLURM_NTASKS"),
        (SRUN | {"SLURM_NTASKS": "1"}, None),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, None),  # sbatch alone
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "OMPI_COMM_WORLD_SIZE"),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "TPU_WORKER_HOSTNAMES"),
        ({"TPU_WORKER_HOSTNAMES": "a"}, None),
        ({"MEGASCALE_COORDINATOR_ADDRESS": "a"}, "MEGASCALE_COORDINATOR_ADDRESS"),
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, "JAX_COORDINATOR_ADDRESS"),
        (KUBERNETES, "JOB_COMPLETION_INDEX"),
        (KUBERNETES | {"TPU_WORKER_HOSTNAMES": "a"}, None),
        (KUBERNETES | {"TPU_WORKER_HOSTNAMES": "a,b"}, "TPU_WORKER_HOSTNAMES"),
    ],
)
def test_what_a_launcher_announces(environ: dict[str, str], by: str | None) -> None:
    assert processes.announced(environ) == by


@pytest.mark.parametrize(
    ("flags", "environ", "message"),
    [
        (
            "--coordinator a:1",
            {},
            "--coordinator: give --coordinator HOST:PORT, --processes N and --process I together",
        ),
        ("--processes 2 --process 1", {}, "--processes, --process: give --coordinator HOST:PORT"),
        ("--processes 2 --process 2 --coordinator a:1", {}, "counted from 0: got process 2 of 2"),
        ("--processes 0 --process 0", {"JAX_COORDINATOR_ADDRESS": "a:1"}, "got process 0 of 0"),
        ("--processes 2 --process 0 --coordinator a", {}, "should be HOST:PORT, such as localhost:1234, got 'a'"),
        ("--processes 2 --process 0 --coordinator a:x", {}, "should be HOST:PORT"),
        ("--distributed off --processes 2", {}, "--distributed off is one process, but --processes describes several"),
        ("--distributed off --heartbeat-timeout 9", {}, "but --heartbeat-timeout describes several"),
        ("--heartbeat-timeout 0", {}, "--heartbeat-timeout is in seconds and at least 2, got 0"),
        ("", SRUN | {"SLURM_NTASKS": "two"}, "SLURM_NTASKS in the environment should be the number of processes"),
    ],
)
def test_a_description_that_does_not_fit(
    flags: str,
    environ: dict[str, str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert main(["train", "tiny", *flags.split()]) == 2
    said = capsys.readouterr().err
    assert message in said and said.startswith("delta-jax train: error: ") and said.count("\n") == 1


def test_a_port_that_is_taken() -> None:
    with processes.socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            ValueError, match=rf"--coordinator: process 0 cannot listen on port {port} \(Address already"
        ):
            processes.join(coordinator=f"localhost:{port}", processes=2, process=0)


def test_a_stop_is_agreed_upon(monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM is the notifier's, SIGINT becomes one, and the answer is that of all processes."""
    asked: list[int] = []
    received: list[int] = []
    monkeypatch.setattr(signals, "several", lambda: True)
    monkeypatch.setattr(
        signals.multihost_utils, "reached_preemption_sync_point", lambda step: asked.append(step) or step == 3
    )
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    told: list[tuple[str, bool]] = []
    try:
        with signals.StopRequest(lambda *what: told.append(what)) as stop:
            assert not stop.ask()
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.3)
            assert (received, told) == ([signal.SIGTERM], [("SIGINT", False)])
            assert not stop.requested
            assert [stop.ask() for _ in range(3)] == [False, True, True]
    finally:
        signal.signal(signal.SIGTERM, before)
    assert asked == [1, 2, 3]


def test_one_process_says_and_waits_for_nothing() -> None:
    processes.wait_for_all("now")
    assert processes.gather({"a": [1]}) == [{"a": [1]}]
    assert processes.all_arrive("now", 1)
    assert processes.is_first() and not processes.several()


def test_hosts_that_have_not_joined(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(ValueError, match="those of 4 processes, which have not joined: give --distributed on"):
        train(load_config(TrainConfig, table()), progress=False)


def test_each_process_hashes_its_own_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("parameters/ocdbt.process_0/d/a", "parameters/ocdbt.process_1/d/b", "parameters/d/c", "data/metadata")
    hashed: list[tuple[int, str]] = []
    who = [0]
    monkeypatch.setattr(jax, "process_index", lambda: who[0])
    with checkpoint.Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        unfinished = tmp_path / "checkpoints" / "5.orbax-checkpoint-tmp"
        for name in names:
            (unfinished / name).parent.mkdir(parents=True, exist_ok=True)
            (unfinished / name).write_text(name)
        monkeypatch.setattr(
            checkpoint, "digest", lambda path: hashed.append((who[0], str(path.relative_to(unfinished)))) or path.name
        )
        checkpoints._saving = 5
        for who[0] in (1, 0):
            checkpoints._digested = -1  # another process, another object
            for key in ("written", "committed"):
                checkpoints._digest_and_wait(key=key, timeout_ms=1)
        checkpoints._write_digests()
    assert sorted(hashed) == sorted([(0, names[0]), (1, names[1]), (0, names[2]), (0, names[3])])
    assert json.loads((unfinished / "digests.json").read_text()) == {name: Path(name).name for name in names}
    assert [path.name for path in unfinished.glob("digests*")] == ["digests.json"]


PAGE = (Path(__file__).parents[2] / "docs" / "how_to" / "processes.md").read_text()


def test_the_scripts_of_the_page() -> None:
    """Shell that parses, manifests that are such, and options that `train` has."""
    scripts = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    assert len(scripts) >= 3
    manifests = [
        manifest for text in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL) for manifest in yaml.safe_load_all(text)
    ]
    assert [manifest["kind"] for manifest in manifests] == ["Service", "Job"]
    service, job = manifests
    pod = job["spec"]["template"]["spec"]
    assert job["spec"]["completions"] == job["spec"]["parallelism"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert pod["subdomain"] == service["metadata"]["name"]
    (container,) = pod["containers"]
    scripts += container["args"]
    assert f"--coordinator {job['metadata']['name']}-0.{pod['subdomain']}:" in container["args"][0]
    assert f"--processes {job['spec']['completions']} " in container["args"][0]
    for script in scripts:
        subprocess.run(["bash", "-n"], input=script, text=True, check=True, timeout=10)
        for command in re.findall(r"delta-jax (train[^&|;>'\n]*)", re.sub(r"\\\n\s*", "", script)):
            words = shlex.split(re.sub(r"\$\w+", "0", command))
            assert _parse(words).config == "my_model.toml"


SLOWLY = """
import time
from delta_jax.training import loop
shard_batch = loop.shard_batch
loop.shard_batch = lambda *arguments: time.sleep(0.1) or shard_batch(*arguments)
"""


def _check_lines(output: Path, uninterrupted: Path, steps: int) -> None:
    """Every step once, with the numbers of a run in one process."""
    entries = read_metrics(output / TRAINING)
    assert (output / TRAINING).read_text().count("\n") == len(entries) == steps
    for entry, expected in zip(entries, read_metrics(uninterrupted / TRAINING), strict=False):
        assert (entry["step"], entry["tokens"]) == (expected["step"], expected["tokens"])
        assert entry["loss"] == pytest.approx(expected["loss"], rel=1e-6), entry["step"]
        assert entry["gradient_norm"] == pytest.approx(expected["gradient_norm"], rel=1e-5), entry["step"]


def _ended(process: subprocess.Popen[str]) -> str:
    """That a process ended with one sentence because another one was lost; the sentence."""
    code, _, err = finish(process)
    assert code == processes.LOST, err
    (sentence,) = [line for line in err.splitlines() if line.startswith("delta-jax")]
    assert sentence.endswith("the same command goes on from the newest checkpoint")
    return sentence


@pytest.fixture
def several(cache: Path) -> Iterator[Several]:
    """Start processes that do not outlive the test."""
    started: list[subprocess.Popen[str]] = []

    def start(count: int, table: dict[str, Any], *flags: str, prepare: str = "") -> list[subprocess.Popen[str]]:
        together = start_several(count, table, cache, *flags, prepare=prepare)
        started.extend(together)
        return together

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_a_signal_to_any_process_stops_all(uninterrupted: Path, table: Table, several: Several) -> None:
    changed = table(checkpoint={"every": 1000})
    output = Path(changed["output"])
    first, second = several(2, changed, prepare=SLOWLY)
    wait_for_step(output, 3, first, second)
    second.send_signal(signal.SIGTERM)
    ended = [finish(process) for process in (first, second)]
    assert [code for code, _, _ in ended] == [0, 0], ended
    (stopped,) = [int(path.name) for path in (output / "checkpoints").iterdir()]
    assert 3 <= stopped < 40
    assert f"stopped after step {stopped}, saved in {output}; run the same again" in ended[0][1]
    assert "step" not in ended[1][1]  # one of them prints
    assert len(list((output / "tensorboard").iterdir())) == 1
    _check_lines(output, uninterrupted, stopped)

    saved = output / "checkpoints" / str(stopped)
    names = json.loads((saved / "digests.json").read_text())
    assert sorted(path.name for path in saved.glob("digests*")) == ["digests.json"]
    victim = next(saved / name for name in names if "ocdbt.process_1/d/" in name)
    whole = victim.read_bytes()
    victim.write_bytes(whole[:-1])
    found = [checkpoint._damage(saved, share, shares) for share, shares in ((0, 1), (0, 2), (1, 2), (2, 3))]
    assert [damage is None for damage in found] == [False, True, False, True]
    victim.write_bytes(whole)

    result = train(load_config(TrainConfig, changed), devices=jax.devices()[:1], progress=False)
    assert not result.interrupted
    _check_lines(output, uninterrupted, 40)
    evaluations = [(entry["step"], entry["loss"]) for entry in read_metrics(output / EVALUATION)]
    expected = read_metrics(uninterrupted / EVALUATION)
    assert evaluations == [(entry["step"], pytest.approx(entry["loss"], rel=1e-6)) for entry in expected]


@pytest.mark.slow
def test_a_lost_process_ends_the_others(uninterrupted: Path, table: Table, several: Several) -> None:
    """Killed, the coordinator too; or silent, so that no connection is closed and only heartbeats tell."""
    output = Path(table()["output"])
    silent = 20
    for step, victim, number, flags, seconds in (
        (7, 1, signal.SIGKILL, (), 10),
        (14, 0, signal.SIGKILL, (), 10),
        (21, 1, signal.SIGSTOP, ("--heartbeat-timeout", str(silent)), silent + 10),
    ):
        both = several(2, table(), *flags, prepare=SLOWLY)
        wait_for_step(output, step, *both)
        both[victim].send_signal(number)
        begin = time.monotonic()
        sentence = _ended(both[1 - victim])
        assert time.monotonic() - begin < seconds, step
        assert number == signal.SIGKILL or "process 0 lost another process of this run" in sentence
        both[victim].kill()
    ended = [finish(process) for process in several(4, table())]
    assert [code for code, _, _ in ended] == [0] * 4, ended
    assert "continuing from checkpoint" in ended[0][1]
    _check_lines(output, uninterrupted, 40)
