"""A layer's raw gradient on a GPU: settled in a pass of its own, or left pending for the kernels that read it.

The gradient is alpha*g + beta*y + delta per channel, where g is what the backward pass of the layer after has stored,
and y the layer's own output. Settling it reads both and writes the result: three walks over memory. The Triton kernels
can make it as they load g and y instead: one read more each time that they load a value, without that pass.

Which is faster is measured once per shape, with the kernels that were chosen for the two gradients, and remembered with
their choices (:mod:`ganvas.ops.tuning`): directions ``settle_backward``, and ``settle_backward_input`` and
``settle_backward_weight`` where one gradient alone is asked for. A way that gives a wrong result is left out.

Unmeasured (``GANVAS_AUTOTUNE=0``, ``GANVAS_BACKEND=triton``, a shape that the capture of a CUDA graph meets first) it
stays pending where its values are loaded three times at most: the input's gradient loads each once per tap, the
weight's once per tile of its rows (tap, input channel), which are 64 or more. So it is for 1×1 kernels of up to 128
input channels, and the weight's gradient alone of few channels and taps, as the first layer's of images.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import import_module

import torch
from torch import Tensor

from ganvas.ops import tuning
from ganvas.ops.backends.cuda.pending import settle
from ganvas.ops.backends.gpu.convolution import TritonConvolution, case_of, multiplied_as, shape_of
from ganvas.ops.backends.gpu.measure import decided, fastest
from ganvas.ops.backends.trial import Direction, backward_trial, trial
from ganvas.ops.convolution import Geometry
from ganvas.ops.pending import Pending, PendingGradient

_WALKS_TO_SETTLE = 3
_LEAST_ROWS = 64  # of a tile of the weight's gradient


def stays_pending(
    geometry: Geometry,
    weight: Tensor,
    input_shape: torch.Size,
    dtype: torch.dtype,
    readers: Mapping[Direction, TritonConvolution],
    backend: str | None = None,
) -> bool:
    """Whether the kernels that read a raw gradient do better with a pending one (:func:`pending_gradient`).

    Args:
        geometry, weight, input_shape, dtype: of the layer's convolution.
        readers: its kernels by direction, ``backward_input``, ``backward_weight`` or both.
        backend: ``triton``, as GANVAS_BACKEND, where there is no choice of convolutions.
    """
    forced = backend or os.environ.get("GANVAS_BACKEND")
    key = (
        "raw gradient", geometry, weight.shape, input_shape, dtype, weight.device, multiplied_as(dtype), forced,
        *readers.items(),
    )  # fmt: skip
    try:
        return tuning.decisions[key]
    except KeyError:
        pass
    unmeasured = _reads(weight, input_shape[1], readers) <= _WALKS_TO_SETTLE
    if forced == "triton":
        return tuning.decided(key, unmeasured)
    return decided(key, lambda: _measured(geometry, weight, input_shape, dtype, readers), unmeasured, False)


def pending_gradient(grad: Tensor, sums: Tensor, pending: Pending) -> tuple[PendingGradient, Tensor, Tensor]:
    """As :func:`ganvas.ops.backends.cuda.pending.settle`, the gradient of ``stored`` pending, with batch statistics.

    ``grad`` stays as it is.
    """
    return import_module("ganvas.ops.backends.gpu.pending_coefficients").pending_gradient(grad, sums, pending)


def _reads(weight: Tensor, in_channels: int, readers: Mapping[Direction, TritonConvolution]) -> int:
    """Of a value of the raw gradient, by all of ``readers``."""
    taps = weight.shape[2:].numel()
    reads = {"backward_input": taps, "backward_weight": -(-taps * in_channels // _LEAST_ROWS)}
    return sum(reads[direction] for direction in readers)


def _measured(
    geometry: Geometry,
    weight: Tensor,
    input_shape: torch.Size,
    dtype: torch.dtype,
    readers: Mapping[Direction, TritonConvolution],
) -> bool:
    direction = f"settle_{next(iter(readers))}" if len(readers) == 1 else "settle_backward"
    case, device = case_of(geometry, weight, input_shape, dtype, direction), weight.device

    def measure() -> tuning.Entry:
        kernels = import_module("ganvas.ops.backends.gpu")
        of_shape = trial(kernels, geometry, weight.shape, shape_of(case), dtype, device, next(iter(readers)))
        of_both = backward_trial(of_shape)
        ways = {"settled": of_both.native(readers, settle), "pending": of_both.native(readers, pending_gradient)}
        return fastest(case, ways, of_both.torchs(readers), device)

    return tuning.remembered(case, measure).configuration == "pending"
