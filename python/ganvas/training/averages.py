"""Averages over the steps of a log window, kept on the device until the window ends."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ganvas.training.device_time import Moment


class Reading:
    """Means of a log window, on their way from the device; see :meth:`Averages.take`."""

    def __init__(self, totals: dict[str, Tensor], counts: dict[str, int], device: torch.device) -> None:
        self.steps = max(counts.values(), default=0)
        """Of the window."""
        self._counts = counts
        self._totals = _on_host(list(totals.values()), device)
        self.taken = Moment(device)
        """When the device has got to the end of the window."""

    def means(self) -> dict[str, float]:
        """By name. Waits for the device if it is not there yet."""
        self.taken.wait()
        return {name: total / count for (name, count), total in zip(self._counts.items(), self._totals.tolist())}


def _on_host(totals: list[Tensor], device: torch.device) -> Tensor:
    """The same numbers in one tensor, for which the host does not wait where ``device`` is a GPU."""
    if not totals:
        return torch.zeros(0)
    # After a resume the totals that nothing was added to are still on the CPU.
    stacked = torch.stack([total.to(device) for total in totals])
    if device.type == "cpu":
        return stacked
    return torch.empty(stacked.shape, dtype=stacked.dtype, pin_memory=True).copy_(stacked, non_blocking=True)


class Averages:
    """Means of named 0-dim tensors. Neither adding nor taking makes the host wait for the device."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add one step's values; a name may be missing in some steps and is averaged over the others."""
        for name, value in values.items():
            value = value.detach()
            total = self._sums.get(name)
            # float64, so that the mean does not depend on how many values came before.
            if total is None:
                self._sums[name] = value.to(torch.float64, copy=True)
            else:
                # After a resume the total comes from the CPU.
                self._sums[name] = total.to(value.device).add_(value)
            self._counts[name] = self._counts.get(name, 0) + 1

    def take(self, device: torch.device) -> Reading:
        """The means since the last call. ``device``: of the values that were added."""
        reading = Reading(self._sums, self._counts, device)
        self._sums, self._counts = {}, {}
        return reading

    def state_dict(self) -> dict[str, Any]:
        return {"sums": dict(self._sums), "counts": dict(self._counts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._sums, self._counts = dict(state["sums"]), dict(state["counts"])
