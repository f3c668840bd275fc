"""Detectors of a run that has gone wrong.

==================== ================================================================================================
Detector             Fires when
==================== ================================================================================================
:func:`check_finite` an averaged loss or a parameter is NaN or infinite
StuckDiscriminator   the discriminator has been right about every real and every generated image for ``after_steps``
                     steps on end: its gradient has vanished, the generator learns nothing any more (Arjovsky &
                     Bottou 2017). Only for losses whose logits have a threshold at 0.
DiversityCollapse    generated images differ from one another by less than ``floor`` of what real images do, having
                     once differed by more (a new generator draws uniform grey and has not collapsed)
==================== ================================================================================================

A detector sees the numbers of each log window and each evaluation, and raises :class:`TrainingFault`; the run then goes
back to its last good checkpoint with lower learning rates (:mod:`ganvas.training.run`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import nn


class TrainingFault(Exception):
    """What a detector found."""


class TrainingFailed(RuntimeError):
    """A run gave up after too many faults; its folder keeps everything up to the last good checkpoint."""


class Detector(Protocol):
    """Looks at the numbers of a run; has state, which is part of the checkpoint."""

    @property
    def suspicious(self) -> bool:
        """Close to firing: a checkpoint taken now is none to return to."""

    def observe(self, values: Mapping[str, float], steps: int) -> None:
        """``values``: averages over the last ``steps`` steps, or of an evaluation (``steps`` = 0).

        Raises:
            TrainingFault: the run has gone wrong.
        """

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def check_finite(values: Mapping[str, float], modules: Mapping[str, nn.Module]) -> None:
    """Raise unless every value, every parameter and every buffer is finite.

    Raises:
        TrainingFault: names the first that is not.
    """
    for name, value in values.items():
        if not math.isfinite(value):
            raise TrainingFault(f"{name} is {value}")
    for name, module in modules.items():
        # torch._foreach_norm would take fewer calls, but a large finite parameter overflows its square.
        tensors = [tensor for tensor in module.state_dict().values() if tensor.is_floating_point() and tensor.numel()]
        if tensors and not bool(torch.stack([tensor.isfinite().all() for tensor in tensors]).all()):
            raise TrainingFault(f"a weight of the {name} is NaN or infinite")


class StuckDiscriminator:
    """See the table above. ``after_steps``: how long on end both accuracies must be 1 (above 0.9995)."""

    def __init__(self, after_steps: int) -> None:
        self._after_steps = after_steps
        self._steps = 0

    @property
    def suspicious(self) -> bool:
        return self._steps > 0

    def observe(self, values: Mapping[str, float], steps: int) -> None:
        accuracies = [values.get("train/real_accuracy"), values.get("train/fake_accuracy")]
        if None in accuracies:
            return
        stuck = all(accuracy > 0.9995 for accuracy in accuracies if accuracy is not None)
        self._steps = self._steps + steps if stuck else 0
        if self._steps >= self._after_steps:
            raise TrainingFault(
                f"the discriminator has made no mistake for {self._steps} steps; the generator has stalled"
            )

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._steps = state["steps"]


class DiversityCollapse:
    """See the table above. ``floor``: share of the real images' spread, in (0, 1)."""

    def __init__(self, floor: float) -> None:
        self._floor = floor
        self._was_above = False

    @property
    def suspicious(self) -> bool:
        return False

    def observe(self, values: Mapping[str, float], steps: int) -> None:
        diversity = values.get("test/diversity")
        if diversity is None:
            return
        if diversity >= self._floor:
            self._was_above = True
        elif self._was_above:
            raise TrainingFault(
                f"the generator has collapsed: its images differ by {diversity:.3f} of what real ones do, "
                f"the floor is {self._floor}"
            )

    def state_dict(self) -> dict[str, Any]:
        return {"was_above": self._was_above}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._was_above = state["was_above"]
