"""Which backend runs an operation: the fastest one that can, or the one the caller forces.

A backend is a folder under :mod:`ganvas.ops.backends` with one function ``can_run(op, tensor)`` that returns ``None``,
or the reason why it cannot. ``GANVAS_BACKEND=reference|cpu|triton|cuda`` (or the ``backend`` argument of an op) forces
one: it then raises where it cannot run. An automatic choice falls back to ``reference`` and says so once per reason: as
a warning where a GPU is there that takes none of the kernels. ``GANVAS_BACKEND=triton`` is Triton's convolutions with
the CUDA kernels around them, which it therefore names for operations that are no convolutions too.

On a GPU an automatic choice is a measured one: the first time that an op meets a shape, its kernel and plain torch do
one step on random values, and the kernel is taken where it is right and not slower. ``GANVAS_AUTOTUNE=0`` takes it
unmeasured.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active as are_functorch_transforms_active
from torch.autograd import forward_ad

from ganvas.ops import tuning
from ganvas.ops.backends import cpu, cuda, triton
from ganvas.ops.backends.gpu.measure import fastest
from ganvas.ops.backends.trial import Way

_log = logging.getLogger("ganvas")

# Tried in this order; reference comes last, runs everything and so has no can_run.
_CAN_RUN: dict[str, Callable[[str, Tensor], str | None]] = {
    "cpu": cpu.can_run,
    "triton": triton.can_run,
    "cuda": cuda.can_run,
}
_NAMES = (*_CAN_RUN, "reference")
_said: set[str] = set()


class StepOnGPU(NamedTuple):
    """What is measured before an op's CUDA kernel is chosen."""

    case: tuning.Case
    ways: Callable[[], tuple[Way, Way]]
    """Prepares the kernel's step and plain torch's on random values."""


steps_on_gpu: dict[str, Callable[[Tensor], StepOnGPU]] = {}
"""By op, for a tensor like the one it is called on. An op that is not here (a chain) measures for itself."""


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
        reason = _refusal(forced, op, tensor)
        if reason is not None:
            raise ValueError(f"{source}={forced!r} cannot run {op}: {reason}")
        return forced
    reasons = []
    for name in _CAN_RUN:
        reason = _refusal(name, op, tensor) or _why_not_unasked(op, tensor, measures=True)
        if reason is None:
            return name
        reasons.append(f"{name}: {reason}")
    if not torch.compiler.is_compiling():
        unusable = cuda.unusable(tensor.device) if tensor.is_cuda else None
        if unusable is None:
            _say_once(f"{op} runs as plain torch ({'; '.join(reasons)})")
        else:
            _say_once(f"on {tensor.device} ganvas runs as plain torch: {unusable}", logging.WARNING)
    return "reference"


def could_choose_kernel(op: str, tensor: Tensor, backend: str | None = None) -> bool:
    """Whether :func:`choose` may name another backend than ``reference`` for tensors like this one; measures nothing.

    Raises:
        ValueError: as :func:`choose`.
    """
    if backend or _environment("GANVAS_BACKEND"):
        return choose(op, tensor, backend) != "reference"
    if tensor.is_cuda and torch.compiler.is_compiling():
        return False
    return any(_refusal(name, op, tensor) is None for name in _CAN_RUN)


def explain(op: str, tensor: Tensor) -> dict[str, str | None]:
    """For each backend ``None`` if it would be taken for ``op`` on ``tensor``, otherwise the reason why not.

    The first ``None`` is the automatic choice, as far as it is known without measuring. ``GANVAS_BACKEND`` counts as a
    request for the backend that it names.
    """
    forced = os.environ.get("GANVAS_BACKEND")
    return {
        name: _refusal(name, op, tensor)
        or (None if name in (forced, "reference") else _why_not_unasked(op, tensor, measures=False))
        for name in _NAMES
    }


def _environment(name: str) -> str | None:
    """os.environ.get, without the two exceptions that a variable which is not set costs it: a tenth of a small call."""
    if cpu.native is None or torch.compiler.is_compiling():
        return os.environ.get(name)
    return cpu.native.environment_variable(name)


def _refusal(name: str, op: str, tensor: Tensor) -> str | None:
    if name not in _CAN_RUN:
        return None
    if name == "triton" and op != "conv_bn_leaky_relu" and _environment("GANVAS_BACKEND") == "triton":
        name = "cuda"
    return _CAN_RUN[name](op, tensor) or _unseen_by_kernels()


def _unseen_by_kernels() -> str | None:
    """What no kernel can take part in, whatever its backend."""
    if not torch.compiler.is_compiling() and (are_functorch_transforms_active() or forward_ad._current_level >= 0):
        return "torch.func's transforms and forward-mode differentiation see through plain torch only"
    return None


def _why_not_unasked(op: str, tensor: Tensor, *, measures: bool) -> str | None:
    """Why an automatic choice leaves a kernel alone that can run and that a caller can ask for; None if it does not."""
    if not tensor.is_cuda:
        return None
    if torch.compiler.is_compiling():
        return "torch.compile makes kernels of its own on a GPU (backend= or GANVAS_BACKEND asks for these)"
    if op not in steps_on_gpu or not tuning.applies(0):
        return None
    step = steps_on_gpu[op](tensor)
    entry = tuning.decisions.get(step.case)
    if entry is None:
        if not measures or torch.cuda.is_current_stream_capturing():
            return None
        entry = tuning.decided(step.case, _measured(step, tensor.device))
    if entry.native:
        return None
    return (
        "it failed or gave a wrong result here, as the log says"
        if entry.native_ms is None
        else (f"torch is faster here: {entry.torch_ms:.3f} ms against {entry.native_ms:.3f} ms")
    )


def _measured(step: StepOnGPU, device: torch.device) -> tuning.Entry:
    def measure() -> tuning.Entry:
        kernel, torchs = step.ways()
        return fastest(step.case, {"kernel": kernel}, torchs, device)

    try:
        return tuning.remembered(step.case, measure)
    except torch.OutOfMemoryError:
        pass
    torch.cuda.empty_cache()  # not before: the exception held what had been allocated
    _log.warning("there is no memory for measuring %s, which runs as plain torch in this process", step.case)
    return tuning.Entry(step.case, None, 1.0)


def _say_once(message: str, level: int = logging.INFO) -> None:
    if message not in _said:
        _said.add(message)
        _log.log(level, message)
