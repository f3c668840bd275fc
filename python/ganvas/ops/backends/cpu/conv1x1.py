"""Native 1×1 convolutions of stride 1 and 2 (csrc/cpu/conv1x1_kernel.cpp), between pending activations."""

from __future__ import annotations

import torch
from torch import Tensor

from ganvas.ops.backends.cpu.kernels import LEAST_CHANNELS, Kernels, NativeConvolution, constants
from ganvas.ops.convolution import Geometry

_KERNELS = {
    Geometry(): Kernels.named("conv1x1"),
    Geometry(stride=(2, 2)): Kernels.named("conv1x1_stride2"),
}


def takes(geometry: Geometry, weight: Tensor, input_shape: torch.Size) -> bool:
    """Whether the kernels do this convolution."""
    out_channels, in_channels, *kernel = weight.shape
    return kernel == [1, 1] and geometry in _KERNELS and max(in_channels, out_channels) >= LEAST_CHANNELS


def convolution(geometry: Geometry, weight: torch.Size, input: torch.Size, dtype: torch.dtype) -> NativeConvolution:
    """The kernels for a weight and an input of these shapes, which they take."""
    name = "conv1x1" if geometry.stride == (1, 1) else "conv1x1_stride2"
    return NativeConvolution(
        name, _KERNELS[geometry], constants(dtype, input, weight[0], 0), dtype, geometry.output_shape(input, weight)
    )
