"""Points in the work of a device, which the host may be ahead of."""

from __future__ import annotations

import time

import torch


class Moment:
    """Passes when all has been done that ``device`` was given so far; on the CPU that is at once.

    On a GPU it is a CUDA event in the current stream: the host waits only where it asks.
    """

    def __init__(self, device: torch.device) -> None:
        self._event = None
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record(torch.cuda.current_stream(device))
        self._time = time.monotonic()

    def wait(self) -> None:
        """Until it has passed."""
        if self._event is not None:
            self._event.synchronize()

    def seconds_since(self, earlier: Moment) -> float:
        """By the device's own clock. Both have passed, and belong to one device."""
        if self._event is not None and earlier._event is not None:
            return earlier._event.elapsed_time(self._event) / 1000
        return self._time - earlier._time
