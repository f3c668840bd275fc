"""Averages over the steps of a log window, kept on the device until the window ends."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class Averages:
    """Means of named 0-dim tensors. Adding makes no host synchronisation; reading makes one for all of them."""

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

    def read_and_reset(self) -> tuple[int, dict[str, float]]:
        """(steps, mean by name) since the last call."""
        if not self._sums:
            return 0, {}
        # After a resume the totals that nothing was added to are still on the CPU.
        device = max((total.device for total in self._sums.values()), key=lambda device: device.type != "cpu")
        totals = torch.stack([total.to(device) for total in self._sums.values()]).tolist()
        means = {name: total / count for (name, count), total in zip(self._counts.items(), totals)}
        steps = max(self._counts.values())
        self._sums, self._counts = {}, {}
        return steps, means

    def state_dict(self) -> dict[str, Any]:
        return {"sums": dict(self._sums), "counts": dict(self._counts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._sums, self._counts = dict(state["sums"]), dict(state["counts"])
