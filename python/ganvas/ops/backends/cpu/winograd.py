"""Native 3×3 convolutions of stride 1 (csrc/cpu/winograd.h), between pending activations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ganvas import _native as native
from ganvas.ops.backends.cpu.arguments import empty_pixels
from ganvas.ops.backends.cpu.kernels import LEAST_CHANNELS, Kernels
from ganvas.ops.convolution import Geometry
from ganvas.ops.pending import Pending

_KERNELS = Kernels(
    native.winograd_forward,
    native.winograd_forward_statistics,
    native.winograd_backward_input,
    native.winograd_backward_weight,
)


def takes(geometry: Geometry, weight: Tensor, input_shape: torch.Size) -> bool:
    """Whether the kernels do this convolution."""
    out_channels, in_channels, *kernel = weight.shape
    padding = geometry.padding
    return (
        kernel == [3, 3]
        and geometry == Geometry(padding=padding)
        and padding[0] == padding[1] <= 2
        and max(in_channels, out_channels) >= LEAST_CHANNELS
        and min(input_shape[2:]) + 2 * padding[0] >= 3
    )


def forward(geometry: Geometry, input: Pending, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The raw output (N, Cout, H', W')."""
    return _KERNELS.forward(geometry.padding[0], input, weight.float(), bias, _output(geometry, input, weight))


def forward_with_statistics(
    geometry: Geometry, input: Pending, weight: Tensor, bias: Tensor | None, *norm: Any, **options: Any
) -> Pending:
    """The output with a norm and an activation pending; ``norm``: see :meth:`Kernels.forward_with_statistics`."""
    output = _output(geometry, input, weight)
    return _KERNELS.forward_with_statistics(geometry.padding[0], input, weight.float(), bias, output, *norm, **options)


def backward_input(geometry: Geometry, grad_output: Tensor, weight: Tensor, input: Pending) -> tuple[Tensor, Tensor]:
    """g = dL/d(scale*x + shift) of the pending input, and Σg and Σg·(x − mean), (2, G, Cin)."""
    return _KERNELS.backward_input(geometry.padding[0], grad_output, weight.float(), input)


def backward_weight(geometry: Geometry, grad_output: Tensor, weight: Tensor, input: Pending) -> Tensor:
    """(Cout, Cin, 3, 3) float32."""
    gradient = torch.empty_like(weight, dtype=torch.float32)
    return _KERNELS.backward_weight(geometry.padding[0], grad_output, gradient, input)


def _output(geometry: Geometry, input: Pending, weight: Tensor) -> Tensor:
    return empty_pixels(geometry.output_shape(input.stored.shape, weight.shape), input.stored.dtype)
