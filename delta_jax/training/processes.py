"""Several processes as one run: how they meet, what one of them does for all, and how they part when one is lost.

Everything here is for all processes at once: each calls it in the same place. With one process nothing of it waits, and
nothing is asked.
"""

import ctypes
import json
import os
import signal
import socket
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

AGAIN = "what is saved is intact, and the same command goes on from the newest checkpoint"

TOGETHER = 5
"""Seconds that a process which fails waits for the others to fail likewise, so that each says why."""


def several() -> bool:
    """Whether the run has more than one process."""
    return jax.process_count() > 1


def check_joined() -> None:
    """That several processes know each other.

    Raises:
        ValueError: the devices are of several processes (hosts of a TPU slice find each other by themselves), but
            ``jax.distributed``, by which processes wait for each other and agree, is not initialised.
    """
    if several() and not jax.distributed.is_initialized():
        raise ValueError(
            f"the devices are those of {jax.process_count()} processes, which have not joined: give --distributed on, or "
            "call jax.distributed.initialize() before train"
        )


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


def all_arrive(moment: str, seconds: int) -> bool:
    """Whether all processes come to this moment, which need not be, within some seconds of this one.

    Args:
        moment: its name, for this once.
        seconds: how long this process waits.
    """
    try:
        ocp.multihost.get_barrier_sync_fn()(key=f"delta_jax: {moment}", timeout_ms=1000 * seconds)
    except RuntimeError:  # not within that time, or one of them is lost
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
        _check(given, coordinator, processes, process)
    by = announced(os.environ)
    if jax.distributed.is_initialized() or (distributed == "auto" and not given and by is None):
        return
    if coordinator is not None and process == 0:
        _check_port(int(coordinator.rpartition(":")[2]))
    _end_in_one_sentence(f"the processes did not come together{f' at {coordinator}' if given else ''}")
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            heartbeat_timeout_seconds=HEARTBEAT if heartbeat is None else heartbeat,
            cluster_detection_method="deactivate" if given else None,  # what is said here is all there is to know
        )
        index = jax.process_index()  # asks for devices, of which all must tell all
    except (ValueError, RuntimeError, KeyError) as error:
        sentence = _not_met(error, given, by, coordinator)
        if jax.distributed.is_initialized():
            leave(LOST, f"delta-jax: error: {sentence}")
        raise ValueError(sentence) from error
    _end_in_one_sentence(f"process {index} lost another process of this run, or failed")


def _check(given: list[str], coordinator: str | None, processes: int | None, process: int | None) -> None:
    """That the arguments describe a process of several."""
    if coordinator is None or processes is None or process is None:
        raise ValueError(
            f"{', '.join(given)}: give --coordinator HOST:PORT, --processes N and --process I together, or none of them "
            "where a launcher says it"
        )
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ValueError(f"--coordinator should be HOST:PORT, such as localhost:1234, got {coordinator!r}")
    if processes < 1 or not 0 <= process < processes:
        raise ValueError(
            f"--process should be one of the --processes, counted from 0: got process {process} of {processes}"
        )


def _check_port(port: int) -> None:
    """That the first process can listen there; the runtime would not survive to say so."""
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        socket.create_server(("", port), family=family, dualstack_ipv6=both).close()
    except OSError as error:
        raise ValueError(
            f"--coordinator: process 0 cannot listen on port {port} ({os.strerror(error.errno or 0)})"
        ) from error


def _number(environ: Mapping[str, str], name: str) -> int:
    text = environ.get(name, "1")
    if not text.isdecimal():
        raise ValueError(f"{name} in the environment should be the number of processes, got {text!r}")
    return int(text)


def _not_met(error: Exception, given: list[str], by: str | None, coordinator: str | None) -> str:
    """Why there is no company, and what to say to have it."""
    said = " ".join(str(error).split())
    if given:
        return f"--coordinator: the processes did not come together at {coordinator} ({said})"
    why = f"{by} announces several processes" if by else "--distributed on, and no launcher announces processes"
    return (
        f"{why}, but JAX did not find out who they are ({said.rstrip('.')}): give --coordinator HOST:PORT, --processes N "
        "and --process I, or --distributed off for a run of its own in each process"
    )


_leaving = threading.Lock()
_handlers: list[Any] = []  # which C calls, and does not keep alive


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


def _end_in_one_sentence(what: str) -> None:
    """From here on, where the runtime would abort this process, end it with a sentence and ``LOST``.

    The runtime finds out that a process is lost in a thread of its own, by heartbeats or because the coordinator's
    connection is closed, while the main thread may be in a collective that never returns. It takes no callback from Python,
    but calls abort() in that thread, and the handler of that signal is called there and then; so it may wait for the
    interpreter as any thread may. A handler of Python's own would only be noted for the main thread.

    Args:
        what: has happened then.
    """

    def say(number: int) -> None:
        signal.alarm(2 * TOGETHER)  # should the interpreter or whoever reads be stuck
        leave(LOST, f"delta-jax: error: {what}: the runtime says above why; {AGAIN}")

    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(say)
    _handlers.append(handler)
    libc = ctypes.CDLL(None)
    libc.signal.restype, libc.signal.argtypes = ctypes.c_void_p, [ctypes.c_int, type(handler)]
    libc.signal(signal.SIGABRT, handler)


def is_lost(error: BaseException) -> bool:
    """Whether an error in one of several processes is one of the runtime, such as it raises where another one is lost."""
    runtime = type(error) in (RuntimeError, TimeoutError) or isinstance(error, jax.errors.JaxRuntimeError)
    return runtime and "RESOURCE_EXHAUSTED" not in str(error)


def lost(error: BaseException) -> str:
    """The sentence for such an error."""
    said = " ".join(str(error).split())
    who = f"process {jax.process_index()} of {jax.process_count()}"
    return f"{who} cannot go on with the others, most likely one of them is lost ({said[:300]}); {AGAIN}"
