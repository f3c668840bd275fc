"""A native convolution of one shape (csrc/cpu/convolutions.h), between pending activations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ganvas import _native as native
from ganvas._native import ConvolutionKind
from ganvas.ops.backends.arguments import address, float32
from ganvas.ops.backends.cpu.arguments import DTYPES, empty, empty_pixels, halves
from ganvas.ops.backends.cpu.precision import rounds_float32
from ganvas.ops.pending import Pending, statistics

LEAST_CHANNELS = 16  # below, the transforms outweigh the products that they save


@dataclass(frozen=True)
class NativeConvolution:
    """A convolution of inputs of one shape and dtype, between pending activations.

    It is made once, and called with what differs from call to call. Weights are float32 or made so.
    """

    kind: ConvolutionKind
    native: native.Convolution
    dtype: torch.dtype
    output_shape: torch.Size
    swaps_channels: bool = False
    """torch's transposed convolutions have the input's channels first."""
    writes_activations: ClassVar = True
    """Whether there is :meth:`activated`."""

    def strides(self, weight: Tensor) -> tuple[int, ...]:
        """Of the output's channels, the input's, rows and columns."""
        first, second, row, column = weight.stride()
        return (second, first, row, column) if self.swaps_channels else (first, second, row, column)

    def output(self) -> Tensor:
        """(N, Cout, H', W'), uninitialised."""
        return empty_pixels(self.output_shape, self.dtype)

    def forward(self, input: Pending, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The raw output (N, Cout, H', W')."""
        return self.activated(input, weight, bias, Pending(self.output()))

    def activated(
        self, input: Pending, weight: Tensor, bias: Tensor | None, pending: Pending, residual: Tensor | None = None
    ) -> Tensor:
        """lrelu(scale*output + shift + residual), or whatever activation ``pending`` is, written to its ``stored``.

        Args:
            pending: with fixed statistics; what is stored is not read.
            residual: like the output, channels_last.
        """
        weight, bias, output = weight.float(), float32(bias), pending.stored
        self.native.forward(
            input.groups, input.stored.data_ptr(), address(input.scale), address(input.shift), input.negative_slope,
            input.activation_first, weight.data_ptr(), self.strides(weight), address(bias), output.data_ptr(),
            address(pending.scale), address(pending.shift), pending.negative_slope, pending.activation_first,
            address(residual), torch.get_num_threads(),
        )  # fmt: skip
        return output

    def forward_with_statistics(
        self,
        input: Pending,
        weight: Tensor,
        bias: Tensor | None,
        bn_weight: Tensor | None,
        bn_bias: Tensor | None,
        running_mean: Tensor | None,  # (C,) float32, moved in place
        running_var: Tensor | None,
        momentum: float,
        eps: float,
        negative_slope: float,
        activation_first: bool,
        groups: int,
    ) -> Pending:
        """The output with the norm and the activation after it pending; statistics taken on the way."""
        weight, bias, bn_weight, bn_bias = weight.float(), float32(bias), float32(bn_weight), float32(bn_bias)
        output = self.output()
        mean, var, scale, shift = statistics(groups, output)
        self.native.forward_statistics(
            groups, input.stored.data_ptr(), address(input.scale), address(input.shift), input.negative_slope,
            input.activation_first, weight.data_ptr(), self.strides(weight), address(bias), output.data_ptr(),
            address(bn_weight), address(bn_bias), eps, activation_first, negative_slope, address(running_mean),
            address(running_var), momentum, mean.data_ptr(), var.data_ptr(), scale.data_ptr(), shift.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        return Pending(output, scale, shift, mean, var, bn_weight, bn_bias, eps, negative_slope, activation_first, True)

    def backward_input(self, grad_output: Tensor, weight: Tensor, input: Pending) -> tuple[Tensor, Tensor]:
        """g = dL/d(scale*x + shift) of the pending input, and Σg and Σg·(x − mean), (2, G, Cin)."""
        weight, stored, groups = weight.float(), input.stored, input.groups
        grad_input = empty_pixels(stored.shape, stored.dtype)
        sums = empty(2, groups, stored.shape[1])
        self.native.backward_input(
            groups, grad_output.data_ptr(), weight.data_ptr(), self.strides(weight), stored.data_ptr(),
            address(input.scale), address(input.shift), input.negative_slope, input.activation_first,
            address(input.mean), grad_input.data_ptr(), *halves(sums), torch.get_num_threads(),
        )  # fmt: skip
        return grad_input, sums

    def backward_weight(self, grad_output: Tensor, weight: Tensor, input: Pending) -> Tensor:
        """Like ``weight``, float32."""
        gradient = torch.empty_like(weight, dtype=torch.float32)
        self.native.backward_weight(
            input.groups, input.stored.data_ptr(), address(input.scale), address(input.shift), input.negative_slope,
            input.activation_first, grad_output.data_ptr(), gradient.data_ptr(), self.strides(gradient),
            torch.get_num_threads(),
        )  # fmt: skip
        return gradient


def convolution(
    kind: ConvolutionKind, weight: torch.Size, input: torch.Size, dtype: torch.dtype, padding: int
) -> NativeConvolution:
    """The kernels of one kind, by Winograd, for a weight and an input of these shapes, which they take.

    Args:
        weight: torch's, also where another kernel is made of it.
        padding: equal on all sides.
    """
    transposed = kind is ConvolutionKind.conv_transpose4x4
    made = native.Convolution(
        kind, DTYPES[dtype], multiplies_coarsely(dtype), tuple(input), weight[1 if transposed else 0], padding
    )
    return NativeConvolution(kind, made, dtype, torch.Size(made.output_shape), transposed)


def multiplies_coarsely(dtype: torch.dtype) -> bool:
    """Whether products may be of 16-bit integers, which are finer than bfloat16, or of bfloat16.

    As torch's precision of float32 has them now.
    """
    return dtype is not torch.float32 or rounds_float32()


def multiplies_tiles(dtype: torch.dtype) -> bool:
    """Whether products are of the processor's tiles of bfloat16 numbers, AMX: then by the convolution's definition."""
    return multiplies_coarsely(dtype) and native.has_bfloat16_tiles()
