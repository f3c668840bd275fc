"""Native 4×4 convolutions of stride 2, their transposes, and what can be written as one (csrc/cpu/convolutions.h).

A 3×3 convolution after nearest-neighbour upsampling, or before average pooling, or of stride 2, is a 4×4 convolution of
stride 2 (or its transpose) with the kernel M w Mᵀ, M a 4×3 matrix. The gradient of w is Mᵀ d M, d that of the kernel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from ganvas.ops.backends.cpu.arguments import empty_pixels
from ganvas.ops.backends.cpu.kernels import LEAST_CHANNELS, Kernels, NativeConvolution, constants
from ganvas.ops.pending import Pending

_Rows = tuple[tuple[float, float, float], ...]


_PLAIN = Kernels.named("winograd_stride2")
_TRANSPOSED = Kernels.named("winograd_stride2_transposed")


class _Form(NamedTuple):
    """What the kernels are asked for: the direction, the padding, and M."""

    kernels: Kernels
    padding: int
    rows: _Rows | None = None  # None: the kernel is the weight itself

    @property
    def transposed(self) -> bool:
        return self.kernels is _TRANSPOSED


class Convolution(Enum):
    """What is computed, by torch's names. Every one of them has stride 2 from map to map, and padding 1."""

    conv4x4 = _Form(_PLAIN, 1)
    conv_transpose4x4 = _Form(_TRANSPOSED, 1)  # output_padding 0
    conv3x3_even = _Form(_PLAIN, 1, ((1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0)))  # of maps with even sides
    conv3x3_odd = _Form(_PLAIN, 2, ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)))  # of maps with odd sides
    conv3x3_avg_pool2 = _Form(_PLAIN, 1, ((0.5, 0, 0), (0.5, 0.5, 0), (0, 0.5, 0.5), (0, 0, 0.5)))
    upsample2_conv3x3 = _Form(_TRANSPOSED, 1, ((0, 0, 1), (0, 1, 1), (1, 1, 0), (1, 0, 0)))


def conv3x3(input_shape: torch.Size) -> Convolution | None:
    """The 3×3 convolution of stride 2 for a map of this size; None where height and width differ in parity."""
    height, width = (side % 2 for side in input_shape[2:])
    if height != width:
        return None
    return Convolution.conv3x3_odd if height else Convolution.conv3x3_even


def takes(kind: Convolution, weight: Tensor, input_shape: torch.Size) -> bool:
    """Whether the kernels do this convolution."""
    side = 3 if kind.value.rows else 4
    return (
        weight.shape[2:] == (side, side)
        and max(weight.shape[:2]) >= LEAST_CHANNELS
        and min(input_shape[2:]) >= (1 if kind.value.transposed else 2)
    )


def convolution(kind: Convolution, weight: torch.Size, input: torch.Size, dtype: torch.dtype) -> NativeConvolution:
    """The kernels for a weight and an input of these shapes, which they take. The weight is torch's."""
    form, (batch, _, *sides) = kind.value, input
    grown = 2 * form.padding - 4
    height, width = (2 * side - 2 - grown if form.transposed else (side + grown) // 2 + 1 for side in sides)
    out_channels = weight[1] if kind is Convolution.conv_transpose4x4 else weight[0]
    return _Stride2Convolution(
        kind.name, form.kernels, constants(dtype, input, out_channels, form.padding), dtype,
        torch.Size((batch, out_channels, height, width)), kind,
    )  # fmt: skip


@dataclass(frozen=True)
class _Stride2Convolution(NativeConvolution):
    kind: Convolution

    @property
    def folds_weight(self) -> bool:
        return self.kind.value.rows is not None

    def kernel_of(self, weight: Tensor) -> Tensor:
        return _fold(self.kind, weight)

    def backward_weight(self, grad_output: Tensor, weight: Tensor, input: Pending) -> Tensor:
        rows = self.kind.value.rows
        if rows is not None:
            gradient = empty_pixels((*weight.shape[:2], 4, 4), torch.float32)
            return _unfold(rows, self.fill(gradient, grad_output, input))
        gradient = torch.empty_like(weight, dtype=torch.float32)
        self.fill(_kernel_of(self.kind, gradient), grad_output, input)
        return gradient


def _fold(kind: Convolution, weight: Tensor) -> Tensor:
    """The kernel (Cout, Cin, 4, 4), in whatever order it lies in memory."""
    weight = weight.float()
    if kind.value.rows is None:
        return _kernel_of(kind, weight)
    return _congruent(_squared(kind.value.rows), weight)


def _unfold(rows: _Rows, gradient: Tensor) -> Tensor:
    """The gradient of a 3×3 weight from that of the kernel made of it."""
    return _congruent(_squared(rows).T, gradient)


@cache
def _squared(rows: _Rows) -> Tensor:
    """M ⊗ M, (16, 9)."""
    with torch.inference_mode(False):
        matrix = torch.tensor(rows, dtype=torch.float32, device="cpu")
        return torch.kron(matrix, matrix)


def _congruent(squared: Tensor, weight: Tensor) -> Tensor:
    """M w Mᵀ for each pair of channels, channels_last, in float32, of which autocast would make bfloat16."""
    out_channels, in_channels, *_ = weight.shape
    side = math.isqrt(squared.shape[0])
    taps = weight.permute(0, 2, 3, 1).reshape(out_channels, squared.shape[1], in_channels)
    with torch.autocast("cpu", enabled=False):
        made = squared @ taps
    return made.view(out_channels, side, side, in_channels).permute(0, 3, 1, 2)


def _kernel_of(kind: Convolution, weight: Tensor) -> Tensor:
    """torch's transposed convolutions have the input's channels first."""
    return weight.transpose(0, 1) if kind.value.transposed else weight
