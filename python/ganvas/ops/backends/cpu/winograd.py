"""Native 3×3 convolutions of stride 1 (csrc/cpu/winograd_kernel.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from ganvas._native import ConvolutionKind
from ganvas.ops.backends.cpu import kernels
from ganvas.ops.backends.cpu.kernels import LEAST_CHANNELS, NativeConvolution
from ganvas.ops.convolution import Geometry


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


def convolution(geometry: Geometry, weight: torch.Size, input: torch.Size, dtype: torch.dtype) -> NativeConvolution:
    """The kernels for a weight and an input of these shapes, which they take."""
    return kernels.convolution(ConvolutionKind.conv3x3, weight, input, dtype, geometry.padding[0])
