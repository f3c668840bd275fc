"""Native 4×4 convolutions of stride 2, their transposes, and what can be written as one (csrc/cpu/winograd.h).

A 3×3 convolution after nearest-neighbour upsampling, or before average pooling, or of stride 2, is a 4×4 convolution of
stride 2 (or its transpose) with the kernel M w Mᵀ, M a 4×3 matrix. The gradient of w is Mᵀ d M, d that of the kernel.
"""

from __future__ import annotations

import math
from enum import Enum
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ganvas import _native as native
from ganvas.ops.backends.cpu.arguments import empty_pixels
from ganvas.ops.backends.cpu.kernels import LEAST_CHANNELS, Kernels
from ganvas.ops.pending import Pending

_Rows = tuple[tuple[float, float, float], ...]


_PLAIN = Kernels(
    native.winograd_stride2_forward,
    native.winograd_stride2_forward_statistics,
    native.winograd_stride2_backward_input,
    native.winograd_stride2_backward_weight,
)
_TRANSPOSED = Kernels(
    native.winograd_stride2_transposed_forward,
    native.winograd_stride2_transposed_forward_statistics,
    native.winograd_stride2_transposed_backward_input,
    native.winograd_stride2_transposed_backward_weight,
)


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


def forward(kind: Convolution, input: Pending, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The raw output (N, Cout, H', W'). ``weight`` is torch's, (Cin, Cout, 4, 4) for ``conv_transpose4x4``."""
    form, kernel = kind.value, _fold(kind, weight)
    return form.kernels.forward(form.padding, input, kernel, bias, _output(kind, input, kernel))


def forward_with_statistics(
    kind: Convolution, input: Pending, weight: Tensor, bias: Tensor | None, *norm: Any, **options: Any
) -> Pending:
    """The output with a norm and an activation pending; ``norm``: see :meth:`Kernels.forward_with_statistics`."""
    form, kernel = kind.value, _fold(kind, weight)
    output = _output(kind, input, kernel)
    return form.kernels.forward_with_statistics(form.padding, input, kernel, bias, output, *norm, **options)


def backward_input(kind: Convolution, grad_output: Tensor, weight: Tensor, input: Pending) -> tuple[Tensor, Tensor]:
    """g = dL/d(scale*x + shift) of the pending input, and Σg and Σg·(x − mean), (2, G, Cin)."""
    return kind.value.kernels.backward_input(kind.value.padding, grad_output, _fold(kind, weight), input)


def backward_weight(kind: Convolution, grad_output: Tensor, weight: Tensor, input: Pending) -> Tensor:
    """Like ``weight``, float32."""
    form = kind.value
    if form.rows is not None:
        gradient = empty_pixels((*weight.shape[:2], 4, 4), torch.float32)
        return _unfold(form.rows, form.kernels.backward_weight(form.padding, grad_output, gradient, input))
    gradient = torch.empty_like(weight, dtype=torch.float32)
    form.kernels.backward_weight(form.padding, grad_output, _kernel_of(kind, gradient), input)
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


def _output(kind: Convolution, input: Pending, kernel: Tensor) -> Tensor:
    batch, _, *sides = input.stored.shape
    grown = 2 * kind.value.padding - 4
    height, width = (2 * side - 2 - grown if kind.value.transposed else (side + grown) // 2 + 1 for side in sides)
    shape = (batch, kernel.shape[0], height, width)
    return empty_pixels(shape, input.stored.dtype)
