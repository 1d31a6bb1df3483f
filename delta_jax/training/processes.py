"""Several processes as one run: how they meet, what one of them does for all, and how they part when one is lost.

Everything here is for all processes at once: each calls it in the same place. With one process nothing of it waits, and
nothing is asked.
"""

import ctypes
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

LOST = 75
"""Exit code where another process of the run is lost: EX_TEMPFAIL of sysexits.h, the same command may succeed later."""

HEARTBEAT = 100
"""Seconds after which a silent process counts as lost, unless the command line says otherwise."""

TOGETHER = 5
"""Seconds that a process which fails waits for the others to fail likewise, so that each says why."""


def several() -> bool:
    """Whether the run has more than one process."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Whether this is the process that writes, prints and warns for all."""
    return not several() or jax.process_index() == 0


def wait_for_all(moment: str) -> None:
    """Return when all processes are here: what the first has written is there for the others."""
    if several():
        multihost_utils.sync_global_devices(moment)


def gather(value: Any) -> list[Any]:
    """What each process says here, JSON-able, in their order."""
    if not several():
        return [value]
    said = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.int32(said.size)))
    padded = np.asarray(multihost_utils.process_allgather(np.pad(said, (0, int(sizes.max()) - said.size))))
    return [json.loads(row[:size].tobytes()) for row, size in zip(padded, sizes, strict=True)]


def all_arrive(moment: str, seconds: float) -> bool:
    """Whether all processes come to this moment, which need not be, within some seconds of this one.

    Args:
        moment: its name, for this once.
        seconds: how long this process waits.
    """
    try:
        ocp.multihost.get_barrier_sync_fn()(key=f"delta_jax: {moment}", timeout_ms=int(seconds * 1000))
    except jax.errors.JaxRuntimeError:
        return False
    return True


def announced(environ: Mapping[str, str]) -> str | None:
    """The variable by which a launcher says that there is more than one process; None where none says so.

    Args:
        environ: the environment.

    Raises:
        ValueError: the number of processes in it is no number.
    """
    slurm = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")  # all of them: srun, not sbatch
    if all(name in environ for name in slurm) and _number(environ, "SLURM_NTASKS") > 1:
        return "SLURM_NTASKS"
    if _number(environ, "OMPI_COMM_WORLD_SIZE") > 1:
        return "OMPI_COMM_WORLD_SIZE"
    if "," in environ.get("TPU_WORKER_HOSTNAMES", ""):
        return "TPU_WORKER_HOSTNAMES"
    for name in ("MEGASCALE_COORDINATOR_ADDRESS", "JAX_COORDINATOR_ADDRESS"):
        if environ.get(name):
            return name
    # An index alone does not say how many there are, but a slice of TPUs names its only host.
    if {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= environ.keys() and "TPU_WORKER_HOSTNAMES" not in environ:
        return "JOB_COMPLETION_INDEX"
    return None


def join(
    distributed: str = "auto",
    *,
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    heartbeat: int | None = None,
) -> None:
    """Make this process one of several, before JAX looks for devices; nothing where that has been done already.

    Args:
        distributed: "on"; "off"; "auto" is on where a launcher says that there are several, see ``announced``, or where
            the processes are described here.
        coordinator: HOST:PORT at which the first process listens; default JAX_COORDINATOR_ADDRESS, or what the launcher
            says.
        processes: how many there are; default what the launcher says.
        process: which of them this is, from 0; default likewise.
        heartbeat: seconds after which a silent process counts as lost; default ``HEARTBEAT``.

    Raises:
        ValueError: these do not go together, or the processes do not find each other.
    """
    named = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    given = [name for name, value in named.items() if value is not None]
    if heartbeat is not None and heartbeat < 2:
        raise ValueError(f"--heartbeat-timeout is in seconds and at least 2, got {heartbeat}")
    if distributed == "off":
        if given or heartbeat is not None:
            which = ", ".join(given) or "--heartbeat-timeout"
            raise ValueError(f"--distributed off is one process, but {which} describes several: leave out one of them")
        return
    if given:
        coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
        if coordinator is None or processes is None or process is None:
            raise ValueError(
                f"{', '.join(given)}: give --coordinator HOST:PORT, --processes N and --process I together, or none of "
                "them where a launcher says it"
            )
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
            raise ValueError(f"--coordinator should be HOST:PORT, such as localhost:1234, got {coordinator!r}")
        if processes < 1 or not 0 <= process < processes:
            raise ValueError(
                f"--process should be one of the --processes, counted from 0: got process {process} of {processes}"
            )
    by = announced(os.environ)
    if jax.distributed.is_initialized() or (distributed == "auto" and not given and by is None):
        return
    _end_in_one_sentence()
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            heartbeat_timeout_seconds=HEARTBEAT if heartbeat is None else heartbeat,
            cluster_detection_method="deactivate" if given else None,  # what is said here is all there is to know
        )
    except (ValueError, RuntimeError, KeyError) as error:
        raise ValueError(_not_met(error, given, by, coordinator)) from error


def _number(environ: Mapping[str, str], name: str) -> int:
    text = environ.get(name, "1")
    if not text.isdecimal():
        raise ValueError(f"{name} in the environment should be the number of processes, got {text!r}")
    return int(text)


def _not_met(error: Exception, given: list[str], by: str | None, coordinator: str | None) -> str:
    """Why there is no company, and what to say to have it."""
    said = " ".join(str(error).split())
    if given:
        return f"--coordinator: the processes did not meet at {coordinator} ({said})"
    why = f"{by} says that there are several processes" if by else "--distributed on: no launcher says so"
    return (
        f"{why}, but who they are is not known ({said}): give --coordinator HOST:PORT, --processes N and --process I, or "
        "--distributed off for a run of its own in each process"
    )


_leaving = threading.Lock()
_keep_alive: list[Any] = []


def leave(code: int, sentence: str = "") -> None:
    """End this process at once, without the barrier at which the runtime would wait for the others.

    A process that is lost cannot come to it; and one that fails alone must not keep the others waiting.

    Args:
        code: the exit code. With any but ``LOST``, others that fail likewise get a moment to say so.
        sentence: to print before, for stderr.
    """
    if not _leaving.acquire(blocking=False):
        time.sleep(2 * TOGETHER)  # another thread is about to end the process
        os._exit(code)
    if sentence:
        print(sentence, file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):  # nobody reads any more
            continue
    if code != LOST:
        all_arrive("a process fails", TOGETHER)
    os._exit(code)


def _end_in_one_sentence() -> None:
    """Where the runtime would abort this process because another one is lost, end it with a sentence and ``LOST``.

    The runtime finds out in a thread of its own, by heartbeats or because the coordinator's connection is closed, while
    the main one may be in a collective that never returns. It takes no callback from Python, but calls abort() in that
    thread, and the handler of that signal is called there and then; so it may wait for the interpreter as any thread may.
    A handler of Python's own would only be noted for the main thread.
    """

    def say(number: int) -> None:
        signal.alarm(2 * TOGETHER)  # should the interpreter or whoever reads be stuck
        leave(
            LOST,
            f"delta-jax: error: process {_index()} was ended by the runtime, which says above why: most likely another "
            "process of this run is lost; what is saved is intact, and the same command goes on from the newest checkpoint",
        )

    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(say)
    _keep_alive.append(handler)
    libc = ctypes.CDLL(None)
    libc.signal.restype, libc.signal.argtypes = ctypes.c_void_p, [ctypes.c_int, type(handler)]
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    libc.signal(signal.SIGABRT, handler)


def _index() -> str:
    return str(jax.process_index()) if jax.distributed.is_initialized() else "that was about to join"


def lost(error: BaseException) -> str:
    """The sentence for an error of the runtime in one of several processes."""
    said = " ".join(str(error).split())
    return (
        f"process {jax.process_index()} of {jax.process_count()} cannot go on with the others, most likely one of them is "
        f"lost ({said[:300]}); what is saved is intact, and the same command goes on from the newest checkpoint"
    )
