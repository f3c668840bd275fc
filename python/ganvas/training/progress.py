"""What a person sees of a run: a bar with rate and time left, or plain lines where the output is no terminal."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class ProgressDisplay(Protocol):
    """Is told what a run does. Used as a context manager around the run."""

    def start(self, steps: int, done: int) -> None:
        """``steps`` of the whole run, ``done`` of them already (more than 0 when it is resumed or goes back)."""

    def advance(self, images: int) -> None:
        """One more step, of so many images."""

    def saved(self, step: int) -> None:
        """The checkpoint of this step is on the disk."""

    def message(self, text: str) -> None:
        """A line to keep: an epoch's numbers, a fault."""

    def __enter__(self) -> ProgressDisplay: ...

    def __exit__(self, *exception: object) -> None: ...


class SilentProgress:
    """Shows nothing."""

    def start(self, steps: int, done: int) -> None: ...

    def advance(self, images: int) -> None: ...

    def saved(self, step: int) -> None: ...

    def message(self, text: str) -> None: ...

    def __enter__(self) -> SilentProgress:
        return self

    def __exit__(self, *exception: object) -> None: ...


class PlainProgress(SilentProgress):
    """One line a message or checkpoint, and every ``seconds`` one with the rate and the time left."""

    def __init__(self, seconds: float = 20.0) -> None:
        self._seconds = seconds

    def start(self, steps: int, done: int) -> None:
        self._steps, self._done, self._start_done = steps, done, done
        self._images = 0
        self._started = self._last = time.monotonic()

    def advance(self, images: int) -> None:
        self._done += 1
        self._images += images
        now = time.monotonic()
        if now - self._last >= self._seconds:
            self._last = now
            elapsed = now - self._started
            left = elapsed / (self._done - self._start_done) * (self._steps - self._done)
            rate = self._images / elapsed
            self.message(f"step {self._done}/{self._steps}  {rate:,.0f} images/s  {_duration(left)} left")

    def saved(self, step: int) -> None:
        self.message(f"saved step {step}")

    def message(self, text: str) -> None:
        # Flushed, because a reader at the other end of a pipe follows a run by these lines.
        print(text, flush=True)


class RichProgress(SilentProgress):
    """A bar at the bottom of the terminal; messages scroll above it."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=console,
            expand=True,
        )
        self._task = self._progress.add_task("training", total=None, rate="")

    def start(self, steps: int, done: int) -> None:
        self._progress.reset(self._task, total=steps, completed=done, rate="")
        self._images = 0
        self._started = self._last = time.monotonic()

    def advance(self, images: int) -> None:
        self._images += images
        now = time.monotonic()
        self._progress.advance(self._task)
        # The rate is a string to format: often enough to read, not at each of a thousand steps a second.
        if now - self._last > 0.5:
            self._last = now
            self._progress.update(self._task, rate=f"{self._images / (now - self._started):,.0f} images/s")

    def message(self, text: str) -> None:
        self._progress.console.print(text, highlight=False, markup=False)

    def __enter__(self) -> RichProgress:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()


def make_progress() -> ProgressDisplay:
    """A bar if the standard output is a terminal, plain lines if not."""
    console = Console()
    return RichProgress(console) if console.is_terminal else PlainProgress()


def summary(values: Mapping[str, float]) -> str:
    """``test/accuracy 0.9912  FD[...] 3.21``: numbers of a log line for a person."""
    return "  ".join(f"{name} {value:.4g}" for name, value in values.items())


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
