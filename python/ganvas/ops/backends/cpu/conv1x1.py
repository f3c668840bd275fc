"""Native 1×1 convolutions of stride 1 and 2 (csrc/cpu/conv1x1_kernel.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from ganvas._native import ConvolutionKind
from ganvas.ops.backends.cpu import kernels
from ganvas.ops.backends.cpu.kernels import LEAST_CHANNELS, NativeConvolution
from ganvas.ops.convolution import Geometry

_KINDS = {Geometry(): ConvolutionKind.conv1x1, Geometry(stride=(2, 2)): ConvolutionKind.conv1x1_stride2}


def takes(geometry: Geometry, weight: Tensor, input_shape: torch.Size) -> bool:
    """Whether the kernels do this convolution."""
    out_channels, in_channels, *kernel = weight.shape
    return kernel == [1, 1] and geometry in _KINDS and max(in_channels, out_channels) >= LEAST_CHANNELS


def convolution(geometry: Geometry, weight: torch.Size, input: torch.Size, dtype: torch.dtype) -> NativeConvolution:
    """The kernels for a weight and an input of these shapes, which they take."""
    return kernels.convolution(_KINDS[geometry], weight, input, dtype)
