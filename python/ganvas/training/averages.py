"""Averages over the steps of a log window, kept on the device until the window ends."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ganvas.training.device_time import Moment

_MOST_NAMES = 64


class Averages:
    """Means of named 0-dim tensors.

    The sums stay at their address: a step that is recorded as a CUDA graph may hold the adding. What a replay cannot do
    is the counting, which is therefore apart. Neither adding nor taking makes the host wait for the device.

    Args:
        device: where the values are.
    """

    sums: Tensor
    """(names,) float64, so that a mean does not depend on how many values came before."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(_MOST_NAMES, dtype=torch.float64, device=device)
        self._places: dict[str, int] = {}
        self._counts: dict[str, int] = {}

    @torch.no_grad()
    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add one step's values; a name may be missing in some steps and is averaged over the others."""
        for name, value in values.items():
            self._sum(name).add_(value)

    def count(self, names: Iterable[str]) -> None:
        """Count the values that have been added under these names in one step."""
        for name in names:
            self._counts[name] = self._counts.get(name, 0) + 1

    def take(self) -> Reading:
        """The means since the last call."""
        reading = Reading(self.sums, {name: (self._places[name], count) for name, count in self._counts.items()})
        self.sums.zero_()
        self._counts = {}
        return reading

    def state_dict(self) -> dict[str, Any]:
        return {"sums": {name: self._sum(name) for name in self._counts}, "counts": dict(self._counts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sums.zero_()
        for name, value in state["sums"].items():
            self._sum(name).copy_(value)
        self._counts = dict(state["counts"])

    def _sum(self, name: str) -> Tensor:
        return self.sums[self._places.setdefault(name, len(self._places))]


class Reading:
    """Means of a log window, on their way from the device.

    Args:
        sums: as of :class:`Averages`.
        counts: (place among the sums, how many values) by name.
    """

    def __init__(self, sums: Tensor, counts: Mapping[str, tuple[int, int]]) -> None:
        self.steps = max((count for _, count in counts.values()), default=0)
        """Of the window."""
        self._counts = counts
        self._sums = torch.empty(sums.shape, dtype=sums.dtype, pin_memory=sums.is_cuda).copy_(sums, non_blocking=True)
        self.taken = Moment(sums.device)
        """When the device has got to the end of the window."""

    def means(self) -> dict[str, float]:
        """By name. Waits for the device if it is not there yet."""
        self.taken.wait()
        sums = self._sums.tolist()
        return {name: sums[place] / count for name, (place, count) in self._counts.items()}
