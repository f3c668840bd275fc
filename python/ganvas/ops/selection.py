"""Which backend runs an operation: the fastest one that can, or the one the caller forces.

A backend is a folder under :mod:`ganvas.ops.backends` with one function ``can_run(op, tensor)`` that returns ``None``,
or the reason why it cannot. ``GANVAS_BACKEND=reference|cpu|cuda`` (or the ``backend`` argument of an op) forces one: it
then raises where it cannot run. An automatic choice leaves out kernels that are there on request only, falls back to
``reference`` and says so once per reason.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active as are_functorch_transforms_active
from torch.autograd import forward_ad

from ganvas.ops.backends import cpu, cuda

_log = logging.getLogger("ganvas")

# Tried in this order; reference comes last, runs everything and so has no can_run.
_CAN_RUN: dict[str, Callable[[str, Tensor], str | None]] = {"cpu": cpu.can_run, "cuda": cuda.can_run}
# For backends that keep some kernels from the automatic choice: why.
_ON_REQUEST_ONLY: dict[str, Callable[[str], str | None]] = {"cuda": cuda.on_request_only}
_NAMES = (*_CAN_RUN, "reference")
_said: set[str] = set()


def available_backends() -> tuple[str, ...]:
    """Names that ``backend=`` and ``GANVAS_BACKEND`` accept, in the order in which they are tried."""
    return _NAMES


def choose(op: str, tensor: Tensor, backend: str | None) -> str:
    """The name of the backend that runs ``op`` on ``tensor``.

    Raises:
        ValueError: ``backend`` (or ``GANVAS_BACKEND``) is no backend's name, or that backend cannot run the op.
    """
    forced = backend or _environment("GANVAS_BACKEND")
    if forced:
        source = "backend" if backend else "GANVAS_BACKEND"
        if forced not in _NAMES:
            raise ValueError(f"{source} must be one of {', '.join(_NAMES)}; got {forced!r}")
        reason = _refusal(forced, op, tensor, requested=True)
        if reason is not None:
            raise ValueError(f"{source}={forced!r} cannot run {op}: {reason}")
        return forced
    reasons = []
    for name in _CAN_RUN:
        reason = _refusal(name, op, tensor, requested=False)
        if reason is None:
            return name
        reasons.append(f"{name}: {reason}")
    if not torch.compiler.is_compiling():
        _say_once(f"{op} runs as plain torch ({'; '.join(reasons)})")
    return "reference"


def explain(op: str, tensor: Tensor) -> dict[str, str | None]:
    """For each backend ``None`` if it would be taken for ``op`` on ``tensor``, otherwise the reason why not.

    The first ``None`` is the automatic choice. ``GANVAS_BACKEND`` counts as a request for the backend that it names.
    """
    forced = os.environ.get("GANVAS_BACKEND")
    return {name: _refusal(name, op, tensor, requested=name == forced) for name in _NAMES}


def _environment(name: str) -> str | None:
    """os.environ.get, without the two exceptions that a variable which is not set costs it: a tenth of a small call."""
    if cpu.native is None or torch.compiler.is_compiling():
        return os.environ.get(name)
    return cpu.native.environment_variable(name)


def _refusal(name: str, op: str, tensor: Tensor, *, requested: bool) -> str | None:
    if name not in _CAN_RUN:
        return None
    reason = _CAN_RUN[name](op, tensor) or _unseen_by_kernels()
    if reason is None and not requested and name in _ON_REQUEST_ONLY:
        reason = _ON_REQUEST_ONLY[name](op)
    return reason


def _unseen_by_kernels() -> str | None:
    """What no kernel can take part in, whatever its backend."""
    if not torch.compiler.is_compiling() and (are_functorch_transforms_active() or forward_ad._current_level >= 0):
        return "torch.func's transforms and forward-mode differentiation see through plain torch only"
    return None


def _say_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        _log.info(message)
