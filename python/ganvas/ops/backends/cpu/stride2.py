"""Native 4×4 convolutions of stride 2, their transposes, and what can be written as one (csrc/cpu/convolutions.h)."""

from __future__ import annotations

import torch
from torch import Tensor

from ganvas._native import ConvolutionKind
from ganvas.ops.backends.cpu import kernels
from ganvas.ops.backends.cpu.kernels import LEAST_CHANNELS, NativeConvolution

KINDS = (
    ConvolutionKind.conv4x4,
    ConvolutionKind.conv_transpose4x4,
    ConvolutionKind.conv3x3_even,
    ConvolutionKind.conv3x3_odd,
    ConvolutionKind.conv3x3_avg_pool2,
    ConvolutionKind.upsample2_conv3x3,
)
"""Every one of them has stride 2 from map to map, and padding 1."""

_TRANSPOSED = frozenset({ConvolutionKind.conv_transpose4x4, ConvolutionKind.upsample2_conv3x3})


def kernel_side(kind: ConvolutionKind) -> int:
    """Of the weight as torch has it."""
    return 4 if kind in (ConvolutionKind.conv4x4, ConvolutionKind.conv_transpose4x4) else 3


def doubles(kind: ConvolutionKind) -> bool:
    """Whether the output is twice as high and wide as the input, not half."""
    return kind in _TRANSPOSED


def conv3x3(input_shape: torch.Size) -> ConvolutionKind | None:
    """The 3×3 convolution of stride 2 for a map of this size; None where height and width differ in parity."""
    height, width = (side % 2 for side in input_shape[2:])
    if height != width:
        return None
    return ConvolutionKind.conv3x3_odd if height else ConvolutionKind.conv3x3_even


def takes(kind: ConvolutionKind, weight: Tensor, input_shape: torch.Size) -> bool:
    """Whether the kernels do this convolution."""
    side = kernel_side(kind)
    return (
        weight.shape[2:] == (side, side)
        and max(weight.shape[:2]) >= LEAST_CHANNELS
        and min(input_shape[2:]) >= (1 if doubles(kind) else 2)
    )


def convolution(kind: ConvolutionKind, weight: torch.Size, input: torch.Size, dtype: torch.dtype) -> NativeConvolution:
    """The kernels for a weight and an input of these shapes, which they take. The weight is torch's."""
    return kernels.convolution(kind, weight, input, dtype, 1)
