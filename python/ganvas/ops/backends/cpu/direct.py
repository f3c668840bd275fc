"""Native convolutions as products of matrices, whatever the kernel (csrc/cpu/direct_kernel.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from ganvas import _native as native
from ganvas._native import ConvolutionKind
from ganvas.ops.backends.cpu.arguments import DTYPES
from ganvas.ops.backends.cpu.kernels import NativeConvolution, multiplies_coarsely
from ganvas.ops.convolution import Geometry


def takes(geometry: Geometry, weight: Tensor, input_shape: torch.Size) -> bool:
    """Whether the kernels do this convolution."""
    return geometry.groups == 1 and not geometry.upsampled


def convolution(geometry: Geometry, weight: torch.Size, input: torch.Size, dtype: torch.dtype) -> NativeConvolution:
    """The kernels for a weight and an input of these shapes, which they take."""
    made = native.Convolution.direct(
        DTYPES[dtype], multiplies_coarsely(dtype), tuple(input), weight[1 if geometry.transposed else 0],
        tuple(weight[2:]), geometry.stride, geometry.padding, geometry.dilation, geometry.output_padding,
        geometry.transposed,
    )  # fmt: skip
    output = torch.Size(made.output_shape)
    return NativeConvolution(ConvolutionKind.direct, made, dtype, output, swaps_channels=geometry.transposed)
