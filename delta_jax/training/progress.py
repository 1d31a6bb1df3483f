"""What a run shows while it trains: a bar in a terminal, a line now and then elsewhere."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class ProgressDisplay:
    """A progress bar with loss, bits per byte, tokens per second and time left.

    Args:
        start: steps done before.
        steps: steps of the whole run.
        enabled: False shows nothing.
        line_seconds: outside a terminal a line is printed this often.
    """

    def __init__(self, start: int, steps: int, *, enabled: bool = True, line_seconds: float = 10.0):
        self._console = Console(quiet=not enabled)
        self._steps = steps
        self._line_seconds = line_seconds
        self._last_line = -float("inf")
        self._progress = Progress(
            TextColumn("{task.fields[text]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task("train", total=steps, completed=start, text="compiling")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
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
        now = time.monotonic()
        if not self._console.is_terminal and (now - self._last_line >= self._line_seconds or step == self._steps):
            self._last_line = now
            self._console.print(f"step {step}/{self._steps}  {text}", highlight=False)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._console.print(text, highlight=False, soft_wrap=True)


def _thousands(value: float) -> str:
    return "-" if value <= 0 else f"{value / 1000:.1f}k" if value >= 1000 else f"{value:.0f}"
