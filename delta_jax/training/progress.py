"""What a run shows while it trains: a bar in a terminal, a line now and then elsewhere."""

import contextlib
import time
from collections.abc import Iterator
from datetime import timedelta
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class ProgressDisplay:
    """A progress bar with loss, bits per byte, tokens per second, time gone and time left.

    A run does not end because nobody reads: once standard output is closed, nothing more is shown.

    Args:
        start: steps done before.
        steps: steps of the whole run.
        enabled: False shows nothing.
        line_seconds: outside a terminal a line is printed this often, and for the first step and the last.
    """

    def __init__(self, start: int, steps: int, *, enabled: bool = True, line_seconds: float = 10.0):
        self._console = Console(quiet=not enabled)
        self._first, self._steps = start + 1, steps
        self._line_seconds = line_seconds
        self._start = time.monotonic()
        self._last_line = -float("inf")
        self._progress = Progress(
            TextColumn("{task.fields[text]}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task("train", total=steps, completed=start, text="")

    def __enter__(self) -> "ProgressDisplay":
        with self._unread():
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._unread():
            self._progress.stop()

    def update(self, step: int, loss: float, bits: float, tokens_per_second: float) -> None:
        """Show the figures of a step.

        Args:
            step: steps done.
            loss: nats per token.
            bits: bits per byte.
            tokens_per_second: recent throughput; 0 when not known yet.
        """
        text = f"loss {loss:.3f}  {bits:.3f} bits/byte  {_thousands(tokens_per_second)} tokens/s"
        self._progress.update(self._task, completed=step, text=text)
        self._line(f"step {step}/{self._steps}  {text}", step in (self._first, self._steps))

    def working(self, text: str, *, begins: bool) -> None:
        """Show what is being done that is no step.

        Args:
            text: such as "compiling the training step".
            begins: False where it goes on: outside a terminal that is printed now and then.
        """
        self._progress.update(self._task, text=text)
        self._line(text, begins)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        with self._unread():
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _line(self, text: str, at_once: bool) -> None:
        now = time.monotonic()
        if not self._console.is_terminal and (at_once or now - self._last_line >= self._line_seconds):
            self._last_line = now
            self.say(f"{text}  {timedelta(seconds=round(now - self._start))}")

    @contextlib.contextmanager
    def _unread(self) -> Iterator[None]:
        try:
            yield
        except (OSError, SystemExit):  # a terminal that is gone; what rich makes of a closed pipe
            self._console.quiet = True


def _thousands(value: float) -> str:
    return "-" if value <= 0 else f"{value / 1000:.1f}k" if value >= 1000 else f"{value:.0f}"
