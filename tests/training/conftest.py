"""A corpus, and an uninterrupted run over it."""

import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
from training_runs import finish, run_table, start


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some text files of made-up words."""
    folder = tmp_path_factory.mktemp("corpus")
    chooser = random.Random(0)
    words = ["".join(chooser.choices("abcdefgh", k=chooser.randint(2, 6))) for _ in range(50)]
    for index in range(20):
        (folder / f"{index}.txt").write_text(" ".join(chooser.choices(words, k=300)))
    return folder


@pytest.fixture(scope="session", autouse=True)
def signals_as_in_a_terminal() -> Iterator[None]:
    """What started the tests may ignore signals (nohup, a job in the background), and processes inherit that."""
    usual: dict[signal.Signals, Any] = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
        signal.SIGHUP: signal.SIG_DFL,
    }
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Compiled programs, shared by these tests and the processes they start."""
    folder = tmp_path_factory.mktemp("xla_cache")
    settings = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield folder
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="session")
def uninterrupted(corpus: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a run that nothing stopped."""
    output = tmp_path_factory.mktemp("uninterrupted")
    code, out, err = finish(start(run_table(corpus, output), cache))
    assert (code, out) == (0, out), err
    assert "finished 40" in out
    return output


@pytest.fixture
def table(corpus: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Make the table of a run into this test's folder."""
    return lambda **changes: run_table(corpus, tmp_path / "run") | changes
