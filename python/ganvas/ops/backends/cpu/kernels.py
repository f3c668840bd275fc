"""The four native entry points of a convolution, whose arguments are the same in every family (csrc/cpu/winograd.h)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ganvas import _native as native
from ganvas.ops.backends.arguments import address, float32
from ganvas.ops.backends.cpu.arguments import dtype_of, empty, rows
from ganvas.ops.backends.cpu.precision import rounds_float32
from ganvas.ops.pending import Pending, statistics

LEAST_CHANNELS = 16  # below, the transforms outweigh the products that they save


class Kernels(NamedTuple):
    """Weights are (Cout, Cin, kH, kW) float32, in whatever order they lie in memory; padding is equal on all sides."""

    forward_kernel: Callable[..., None]
    forward_statistics_kernel: Callable[..., None]
    backward_input_kernel: Callable[..., None]
    backward_weight_kernel: Callable[..., None]

    def forward(self, padding: int, input: Pending, weight: Tensor, bias: Tensor | None, output: Tensor) -> Tensor:
        """``output``, filled."""
        bias = float32(bias)
        self.forward_kernel(
            *_input_arguments(padding, input, weight, input.groups), weight.data_ptr(), weight.stride(),
            address(bias), output.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return output

    def forward_with_statistics(
        self,
        padding: int,
        input: Pending,
        weight: Tensor,
        bias: Tensor | None,
        output: Tensor,
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
        """``output``, filled, with the norm and the activation after it pending; statistics taken on the way."""
        bias, bn_weight, bn_bias = float32(bias), float32(bn_weight), float32(bn_bias)
        mean, var, scale, shift = statistics(groups, output)
        self.forward_statistics_kernel(
            *_input_arguments(padding, input, weight, groups), weight.data_ptr(), weight.stride(), address(bias),
            output.data_ptr(), address(bn_weight), address(bn_bias), eps, activation_first, negative_slope,
            address(running_mean), address(running_var), momentum, mean.data_ptr(), var.data_ptr(), scale.data_ptr(),
            shift.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return Pending(output, scale, shift, mean, var, bn_weight, bn_bias, eps, negative_slope, activation_first, True)

    def backward_input(
        self, padding: int, grad_output: Tensor, weight: Tensor, input: Pending
    ) -> tuple[Tensor, Tensor]:
        """g = dL/d(scale*x + shift) of the pending input, and Σg and Σg·(x − mean), (2, G, Cin)."""
        stored, groups = input.stored, input.groups
        grad_input = torch.empty_like(stored)
        sums = empty(2, groups, stored.shape[1])
        self.backward_input_kernel(
            *_products(stored), stored.shape, weight.shape[0], padding, groups, grad_output.data_ptr(),
            weight.data_ptr(), weight.stride(), stored.data_ptr(), address(input.scale), address(input.shift),
            input.negative_slope, input.activation_first, address(input.mean), grad_input.data_ptr(),
            *rows(sums), torch.get_num_threads(),
        )  # fmt: skip
        return grad_input, sums

    def backward_weight(self, padding: int, grad_output: Tensor, gradient: Tensor, input: Pending) -> Tensor:
        """``gradient``, like the weight, filled."""
        self.backward_weight_kernel(
            *_input_arguments(padding, input, gradient, input.groups), grad_output.data_ptr(), gradient.data_ptr(),
            gradient.stride(), torch.get_num_threads(),
        )  # fmt: skip
        return gradient


def _input_arguments(padding: int, input: Pending, weight: Tensor, groups: int) -> Any:
    stored = input.stored
    return (
        *_products(stored), stored.shape, weight.shape[0], padding, groups, stored.data_ptr(), address(input.scale),
        address(input.shift), input.negative_slope, input.activation_first,
    )  # fmt: skip


def _products(stored: Tensor) -> tuple[native.Dtype, bool]:
    """The pixels' dtype, and whether products may be of 16-bit integers, which are finer than bfloat16."""
    return dtype_of(stored), stored.dtype is not torch.float32 or rounds_float32()
