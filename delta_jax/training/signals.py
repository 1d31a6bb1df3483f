"""SIGTERM, Ctrl-C and a closed terminal as a request to stop at the next good moment."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from jax.experimental import multihost_utils

from delta_jax.training.processes import several


def _to_stderr(name: str, again: bool) -> None:
    text = "stopping at once" if again else "stopping when what is at work is done; a second signal stops at once"
    print(f"{name}: {text}", file=sys.stderr, flush=True)


class StopRequest:
    """Within the context, the first SIGTERM, SIGINT or SIGHUP sets ``requested``; a second one acts as it always does.

    Python runs its own handlers between two instructions, which a compilation or a step puts off for as long as it takes.
    So the request is also read, and answered with ``announce``, by a thread that the signal wakes at once. A SIGHUP that
    is ignored (nohup) stays ignored. Outside the main thread Python cannot handle signals, and the context does nothing.

    Where a run has several processes, a signal to any of them is a request to all, and all get it at the same call of
    ``ask``. SIGTERM is left to JAX's notifier, which a handler of Python's would replace: it looks once a second, and tells
    the others. SIGINT and SIGHUP are passed on to it as SIGTERM.

    Args:
        announce: told the signal's name and whether it is not the first, from that thread; may be replaced while the
            context is open.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

    def __init__(self, announce: Callable[[str, bool], None] = _to_stderr) -> None:
        self.requested = False
        self.announce = announce
        self._together = False
        self._asked = 0
        self._count = 0
        self._previous: dict[signal.Signals, Any] = {}
        self._thread: threading.Thread | None = None

    def ask(self) -> bool:
        """Whether to stop; with several processes each must ask at the same places, and gets the same answer."""
        if self._together and not self.requested:
            self._asked += 1
            self.requested = multihost_utils.reached_preemption_sync_point(self._asked)
        return self.requested

    def __enter__(self) -> "StopRequest":
        self._together = several()
        if threading.current_thread() is threading.main_thread():
            self._read, self._write = os.pipe()
            os.set_blocking(self._write, False)
            self._thread = threading.Thread(target=self._listen, name="stop-request", daemon=True)
            self._thread.start()
            self._previous_wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
            for number in self.SIGNALS:
                if self._is_mine(number) and (number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN):
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._restore()
        if self._thread is not None:
            signal.set_wakeup_fd(self._previous_wakeup)
            os.close(self._write)
            self._thread.join()
            os.close(self._read)
            self._thread = None

    def _listen(self) -> None:
        """Runs in the thread: every byte is the number of a signal, and nothing is the end."""
        while numbers := os.read(self._read, 64):
            for number in numbers:
                if self._is_mine(number):
                    self._request()
                    self._count += 1
                    self.announce(signal.Signals(number).name, self._count > 1)

    def _is_mine(self, number: int) -> bool:
        return number in self.SIGNALS and not (self._together and number == signal.SIGTERM)

    def _request(self) -> None:
        """Set ``requested``, or have the notifier ask all processes, once."""
        if not self._together:
            self.requested = True
        elif self._count == 0:
            os.kill(os.getpid(), signal.SIGTERM)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._together:
            self.requested = True
        self._restore()
        time.sleep(0.1)  # lets the thread count: a second one that came before Python could run this is not delivered
        if self._count > 1:
            signal.set_wakeup_fd(-1)
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
