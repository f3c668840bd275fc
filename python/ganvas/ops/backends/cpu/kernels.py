"""A native convolution of one shape: four entry points, the same in every family (csrc/cpu/convolutions.h)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ganvas import _native as native
from ganvas.ops.backends.arguments import address, float32
from ganvas.ops.backends.cpu.arguments import DTYPES, empty, empty_pixels, halves
from ganvas.ops.backends.cpu.precision import rounds_float32
from ganvas.ops.pending import Pending, statistics

LEAST_CHANNELS = 16  # below, the transforms outweigh the products that they save


class Kernels(NamedTuple):
    """What a family of them is entered by (csrc/cpu/convolution.h). Padding is equal on all sides."""

    forward: Callable[..., None]
    forward_statistics: Callable[..., None]
    backward_input: Callable[..., None]
    backward_weight: Callable[..., None]

    @classmethod
    def named(cls, family: str) -> Kernels:
        """Those of the bindings whose names begin with ``family``."""
        return cls(*(getattr(native, f"{family}_{entry}") for entry in cls._fields))


class Constants(NamedTuple):
    """The arguments that every call begins with."""

    dtype: native.Dtype
    integers: bool
    """Whether products may be of 16-bit integers, which are finer than bfloat16, or of bfloat16."""
    input_shape: tuple[int, ...]
    out_channels: int
    padding: int


def constants(dtype: torch.dtype, input_shape: torch.Size, out_channels: int, padding: int) -> Constants:
    """For pixels of ``dtype``; products as torch's precision of float32 has them now."""
    integers = dtype is not torch.float32 or rounds_float32()
    return Constants(DTYPES[dtype], integers, tuple(input_shape), out_channels, padding)


@dataclass(frozen=True)
class NativeConvolution:
    """A convolution of inputs of one shape and dtype, between pending activations.

    It is made once, and called with what differs from call to call. Weights are float32 or made so.
    """

    name: str
    """What is computed."""
    kernels: Kernels
    constants: Constants
    dtype: torch.dtype
    output_shape: torch.Size
    writes_activations: ClassVar = True
    """Whether there is :meth:`activated`."""

    @property
    def folds_weight(self) -> bool:
        """Whether a larger kernel is made of the weight first, at a cost that few pixels do not pay back."""
        return False

    def kernel_of(self, weight: Tensor) -> Tensor:
        """(Cout, Cin, kH, kW) float32 as the kernels read it, in whatever order it lies in memory."""
        return weight.float()

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
        weight, bias, output = self.kernel_of(weight), float32(bias), pending.stored
        self.kernels.forward(
            *self.constants, input.groups, input.stored.data_ptr(), address(input.scale), address(input.shift),
            input.negative_slope, input.activation_first, weight.data_ptr(), weight.stride(), address(bias),
            output.data_ptr(), address(pending.scale), address(pending.shift), pending.negative_slope,
            pending.activation_first, address(residual), torch.get_num_threads(),
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
        weight, bias, bn_weight, bn_bias = self.kernel_of(weight), float32(bias), float32(bn_weight), float32(bn_bias)
        output = self.output()
        mean, var, scale, shift = statistics(groups, output)
        self.kernels.forward_statistics(
            *self.constants, groups, input.stored.data_ptr(), address(input.scale), address(input.shift),
            input.negative_slope, input.activation_first, weight.data_ptr(), weight.stride(), address(bias),
            output.data_ptr(), address(bn_weight), address(bn_bias), eps, activation_first, negative_slope,
            address(running_mean), address(running_var), momentum, mean.data_ptr(), var.data_ptr(), scale.data_ptr(),
            shift.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return Pending(output, scale, shift, mean, var, bn_weight, bn_bias, eps, negative_slope, activation_first, True)

    def backward_input(self, grad_output: Tensor, weight: Tensor, input: Pending) -> tuple[Tensor, Tensor]:
        """g = dL/d(scale*x + shift) of the pending input, and Σg and Σg·(x − mean), (2, G, Cin)."""
        weight, stored, groups = self.kernel_of(weight), input.stored, input.groups
        grad_input = torch.empty_like(stored)
        sums = empty(2, groups, stored.shape[1])
        self.kernels.backward_input(
            *self.constants, groups, grad_output.data_ptr(), weight.data_ptr(), weight.stride(), stored.data_ptr(),
            address(input.scale), address(input.shift), input.negative_slope, input.activation_first,
            address(input.mean), grad_input.data_ptr(), *halves(sums), torch.get_num_threads(),
        )  # fmt: skip
        return grad_input, sums

    def backward_weight(self, grad_output: Tensor, weight: Tensor, input: Pending) -> Tensor:
        """Like ``weight``, float32."""
        return self.fill(torch.empty_like(weight, dtype=torch.float32), grad_output, input)

    def fill(self, gradient: Tensor, grad_output: Tensor, input: Pending) -> Tensor:
        """``gradient``, of what :meth:`kernel_of` makes, in whatever order it lies in memory."""
        self.kernels.backward_weight(
            *self.constants, input.groups, input.stored.data_ptr(), address(input.scale), address(input.shift),
            input.negative_slope, input.activation_first, grad_output.data_ptr(), gradient.data_ptr(),
            gradient.stride(), torch.get_num_threads(),
        )  # fmt: skip
        return gradient
