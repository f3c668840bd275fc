"""Ctrl-C and SIGTERM as a flag that the loop reads between two steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A run was asked to stop; it has finished its step and saved. ``str()`` says where and how to go on.

    A ``KeyboardInterrupt``, so that a script that knows nothing of it ends as it would at Ctrl-C.
    """

    def __init__(self, out: Path, step: int) -> None:
        super().__init__(
            f"interrupted after step {step}, everything is saved in {out}; --resume continues exactly there"
        )
        self.out = out
        self.step = step


class StopRequest:
    """Context manager that turns the first SIGINT or SIGTERM into ``requested``; the second one acts as usual.

    Only the main thread may set signal handlers; anywhere else this does nothing.
    """

    def __init__(self, on_request: Callable[[], None] = lambda: None) -> None:
        self.requested = False
        self._on_request = on_request
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self._restore()
        self._on_request()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            # None: the previous handler was not set from Python and can't be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # type: ignore[arg-type]
        self._previous = {}
