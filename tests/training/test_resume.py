"""A run that is killed or stopped, or whose newest checkpoint is damaged, continues as if it had not been."""

import json
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest
from training_runs import finish, losses, start, wait_for_step

from delta_jax.config import load_config
from delta_jax.training import TrainConfig, restore_model, train

Table = Callable[..., dict[str, Any]]


def _resume(table: dict[str, Any]) -> list[tuple[int, float, float]]:
    result = train(load_config(TrainConfig, table), devices=jax.devices()[:1], progress=False)
    assert not result.interrupted
    return losses(result.output)


def test_the_uninterrupted_run_logs_every_step_once_and_learns(uninterrupted: Path) -> None:
    entries = losses(uninterrupted)
    assert [step for step, _, _ in entries] == list(range(1, 41))
    assert entries[-1][1] < 0.8 * entries[0][1]


def test_kill_minus_nine_at_a_random_step(uninterrupted: Path, table: Table, cache: Path) -> None:
    step = random.SystemRandom().randint(8, 30)
    process = start(table(), cache)
    output = Path(table()["output"])
    wait_for_step(output, step)
    process.send_signal(signal.SIGKILL)
    code, _, _ = finish(process)
    assert code == -signal.SIGKILL, f"killed at step {step}"
    saved = any(path.name.isdigit() for path in (output / "checkpoints").iterdir())
    # The save at step 10 waits until that of step 5 is on disk.
    assert saved or step <= 10, f"killed at step {step}"
    code, out, err = finish(start(table(), cache))
    assert (code, "finished 40" in out) == (0, True), f"killed at step {step}: {err}"
    assert ("continuing from checkpoint" in out) == saved, f"killed at step {step}"
    assert losses(output) == losses(uninterrupted), f"killed at step {step}"
    evaluations = [json.loads(line) for line in (output / "evaluation.jsonl").read_text().splitlines()]
    expected = [json.loads(line) for line in (uninterrupted / "evaluation.jsonl").read_text().splitlines()]
    assert evaluations == expected
    assert [entry["step"] for entry in evaluations] == [0, 20, 40]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_exits_cleanly(
    number: signal.Signals, uninterrupted: Path, table: Table, cache: Path
) -> None:
    process = start(table(checkpoint={"every": 1000}), cache)
    output = Path(table()["output"])
    wait_for_step(output, 3)
    process.send_signal(number)
    code, out, err = finish(process)
    assert code == 0, err
    assert out.splitlines()[-1].startswith("interrupted ")
    stopped = int(out.split()[-1])
    assert 3 <= stopped < 40
    assert (output / "checkpoints" / str(stopped)).is_dir()
    assert [step for step, _, _ in losses(output)] == list(range(1, stopped + 1))
    assert _resume(table()) == losses(uninterrupted)


def _truncate(checkpoint: Path) -> Path:
    victim = max(checkpoint.glob("parameters/**/d/*"), key=lambda path: path.stat().st_size)
    victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
    return victim


def _flip(checkpoint: Path) -> Path:
    victim = max(checkpoint.glob("optimizer/**/d/*"), key=lambda path: path.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    return victim


def _delete(checkpoint: Path) -> Path:
    victim = checkpoint / "data" / "metadata"
    victim.unlink()
    return victim


def _no_digests(checkpoint: Path) -> Path:
    victim = checkpoint / "digests.json"
    victim.write_text(victim.read_text()[:40])
    return victim


@pytest.mark.parametrize("damage", [_truncate, _flip, _delete, _no_digests])
def test_a_damaged_newest_checkpoint_is_passed_over(
    damage: Callable[[Path], Path], uninterrupted: Path, table: Table
) -> None:
    output = Path(table()["output"])
    shutil.copytree(uninterrupted, output)
    victim = damage(output / "checkpoints" / "40")
    with pytest.warns(
        UserWarning, match=rf"continuing from checkpoint 35 .*checkpoint 40 is damaged \(.*{victim.name}"
    ):
        assert _resume(table()) == losses(uninterrupted)
    assert (output / "damaged" / "40").is_dir()
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == ["30", "35", "40"]


@pytest.mark.parametrize("name", ["_CHECKPOINT_METADATA", "commit_success.txt"])
def test_the_files_orbax_keeps_beside_the_data_do_not_matter(name: str, uninterrupted: Path, table: Table) -> None:
    output = Path(table()["output"])
    shutil.copytree(uninterrupted, output)
    (output / "checkpoints" / "40" / name).write_text("{")
    assert _resume(table(steps=41))[:40] == losses(uninterrupted)


def test_the_model_is_read_from_the_newest_intact_checkpoint(uninterrupted: Path, table: Table) -> None:
    output = Path(table()["output"])
    shutil.copytree(uninterrupted, output)
    _flip(output / "checkpoints" / "40")
    with pytest.warns(UserWarning, match=r"using checkpoint 35 .*checkpoint 40 is damaged"):
        restore_model(output)
    assert (output / "checkpoints" / "40").is_dir()  # reading moves nothing


def test_two_damaged_checkpoints_and_all_damaged(uninterrupted: Path, table: Table) -> None:
    output = Path(table()["output"])
    shutil.copytree(uninterrupted, output)
    for step in (40, 35):
        _truncate(output / "checkpoints" / str(step))
    with pytest.warns(UserWarning, match=r"from checkpoint 30 .*checkpoint 40 is damaged.*checkpoint 35 is damaged"):
        assert _resume(table()) == losses(uninterrupted)
    for step in (30, 35, 40):
        _flip(output / "checkpoints" / str(step))
    with pytest.raises(ValueError, match=r"all checkpoints in .* are damaged; checkpoint 40 .*; checkpoint 30 "):
        _resume(table())
    assert (output / "checkpoints" / "40").is_dir()  # nothing is moved when there is nothing to fall back on


def test_a_half_written_checkpoint_is_ignored_and_removed(uninterrupted: Path, table: Table) -> None:
    output = Path(table()["output"])
    shutil.copytree(uninterrupted, output)
    half = output / "checkpoints" / "40.orbax-checkpoint-tmp"
    (output / "checkpoints" / "40").rename(half)
    shutil.rmtree(half / "optimizer")
    assert _resume(table()) == losses(uninterrupted)
    assert not half.exists()


def test_a_finished_run_is_left_as_it_is(uninterrupted: Path, table: Table) -> None:
    output = Path(table()["output"])
    shutil.copytree(uninterrupted, output)
    assert _resume(table()) == losses(uninterrupted)
    assert not (output / "damaged").exists()


def test_resume_on_another_mesh(uninterrupted: Path, table: Table) -> None:
    output = Path(table()["output"])
    shutil.copytree(uninterrupted, output)
    for step in (35, 40):
        shutil.rmtree(output / "checkpoints" / str(step))
    config = load_config(TrainConfig, table(mesh={"data": 2, "fsdp": 2, "tensor": 2}))
    train(config, progress=False)
    for (step, loss, _), (_, expected, _) in zip(losses(output), losses(uninterrupted), strict=True):
        assert loss == pytest.approx(expected, rel=1e-4), step
