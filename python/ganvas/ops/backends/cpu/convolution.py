"""The native convolutions, whichever family computes them."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ganvas.ops.backends.cpu import stride2, winograd
from ganvas.ops.backends.cpu.pending import Pending
from ganvas.ops.convolution import Geometry

_STRIDE_2 = Geometry(stride=(2, 2), padding=(1, 1))


@dataclass(frozen=True)
class NativeConvolution:
    """A convolution between pending activations: a family of kernels, and what that is told first."""

    family: ModuleType
    how: Any

    def forward(self, input: Pending, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The raw output (N, Cout, H', W')."""
        return self.family.forward(self.how, input, weight, bias)

    def forward_with_statistics(self, input: Pending, weight: Tensor, bias: Tensor | None, *norm: Any) -> Pending:
        """The output with a norm and an activation pending; ``norm`` as in :class:`Kernels`."""
        return self.family.forward_with_statistics(self.how, input, weight, bias, *norm)

    def backward_input(self, grad_output: Tensor, weight: Tensor, input: Pending) -> tuple[Tensor, Tensor]:
        """g = dL/d(scale*x + shift) of the pending input, and Σg and Σg·(x − mean), (2, G, Cin)."""
        return self.family.backward_input(self.how, grad_output, weight, input)

    def backward_weight(self, grad_output: Tensor, weight: Tensor, input: Pending) -> Tensor:
        """Like ``weight``, float32."""
        return self.family.backward_weight(self.how, grad_output, weight, input)


def native_convolution(geometry: Geometry, weight: Tensor, input_shape: torch.Size) -> NativeConvolution | None:
    """The kernels of this convolution, or None where torch's is the better one, or the only one."""
    if winograd.takes(geometry, weight, input_shape):
        return NativeConvolution(winograd, geometry)
    kind = _stride2_kind(geometry, weight, input_shape)
    if kind is not None and stride2.takes(kind, weight, input_shape):
        return NativeConvolution(stride2, kind)
    return None


def _stride2_kind(geometry: Geometry, weight: Tensor, input_shape: torch.Size) -> stride2.Convolution | None:
    kernel = tuple(weight.shape[2:])
    if geometry == _STRIDE_2 and kernel == (4, 4):
        return stride2.Convolution.conv4x4
    if geometry == _STRIDE_2 and kernel == (3, 3):
        return stride2.conv3x3(input_shape)
    if geometry == _STRIDE_2._replace(transposed=True) and kernel == (4, 4):
        return stride2.Convolution.conv_transpose4x4
    if geometry == Geometry(padding=(1, 1), upsampled=True) and kernel == (3, 3):
        return stride2.Convolution.upsample2_conv3x3
    return None
