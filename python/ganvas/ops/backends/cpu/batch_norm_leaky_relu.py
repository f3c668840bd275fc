"""Native BatchNorm + LeakyReLU: one pass for the statistics, one that writes; backward the same."""

from __future__ import annotations

import torch
from torch import Tensor

from ganvas import _native as native
from ganvas.ops.backends.arguments import address, float32
from ganvas.ops.backends.cpu.arguments import dtype_of, empty, empty_per_channel
from ganvas.ops.checks import native_layout
from ganvas.ops.schemas import library


def train(
    input: Tensor,  # (N, C) or (N, C, H, W)
    weight: Tensor | None,  # (C,)
    bias: Tensor | None,  # (C,)
    eps: float,
    negative_slope: float,
    activation_first: bool,
    statistics_groups: int,
    running_mean: Tensor | None = None,  # (C,) float32, updated in place
    running_var: Tensor | None = None,  # (C,) float32, updated in place
    momentum: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output like ``input``; mean and biased variance, (statistics_groups, C) float32."""
    mean, var = (empty(statistics_groups, input.shape[1]) for _ in range(2))
    output = _forward(
        input, weight, bias, eps, negative_slope, activation_first, True, mean, var, running_mean, running_var, momentum
    )
    return output, mean, var


def evaluate(
    input: Tensor,  # (N, C) or (N, C, H, W)
    weight: Tensor | None,  # (C,)
    bias: Tensor | None,  # (C,)
    mean: Tensor,  # (C,)
    var: Tensor,  # (C,)
    eps: float,
    negative_slope: float,
    activation_first: bool,
) -> Tensor:
    """Output like ``input``, with fixed statistics."""
    mean, var = float32(mean), float32(var)
    return _forward(input, weight, bias, eps, negative_slope, activation_first, False, mean, var, None, None, 0.0)


def _forward(
    input, weight, bias, eps, negative_slope, activation_first, training, mean, var, running_mean, running_var, momentum
) -> Tensor:
    input, weight, bias = native_layout(input), float32(weight), float32(bias)
    channels = input.shape[1]
    output = torch.empty_like(input)
    native.batch_norm_leaky_relu_forward(
        dtype_of(input), input.numel() // channels, channels, mean.shape[0] if training else 1, eps, negative_slope,
        activation_first, training, input.data_ptr(), address(weight), address(bias), mean.data_ptr(), var.data_ptr(),
        address(running_mean), address(running_var), momentum, output.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return output


def backward(
    grad_output: Tensor,  # like input
    input: Tensor,  # (N, C) or (N, C, H, W)
    weight: Tensor | None,  # (C,)
    bias: Tensor | None,  # (C,)
    mean: Tensor,  # (statistics_groups, C), or (C,) when not training
    var: Tensor,  # like mean
    training: bool,
    eps: float,
    negative_slope: float,
    activation_first: bool,
    statistics_groups: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input (like it), weight and bias ((C,) float32)."""
    grad_output, input = native_layout(grad_output), native_layout(input)
    weight, bias = float32(weight), float32(bias)
    mean, var = float32(mean), float32(var)
    channels = input.shape[1]
    grad_input = torch.empty_like(input)
    grad_weight, grad_bias = empty_per_channel(weight, channels), empty_per_channel(bias, channels)
    native.batch_norm_leaky_relu_backward(
        dtype_of(input), input.numel() // channels, channels, statistics_groups, eps, negative_slope, activation_first,
        training, grad_output.data_ptr(), input.data_ptr(), address(weight), address(bias), mean.data_ptr(),
        var.data_ptr(), grad_input.data_ptr(), grad_weight.data_ptr(), grad_bias.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return grad_input, grad_weight, grad_bias


def add_train(
    input: Tensor,  # (N, C) or (N, C, H, W)
    weight: Tensor | None,  # (C,)
    bias: Tensor | None,  # (C,)
    residual: Tensor,  # like input
    eps: float,
    negative_slope: float,
    statistics_groups: int,
    running_mean: Tensor | None = None,  # (C,) float32, updated in place
    running_var: Tensor | None = None,  # (C,) float32, updated in place
    momentum: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output like ``input``; mean and biased variance, (statistics_groups, C) float32."""
    mean, var = (empty(statistics_groups, input.shape[1]) for _ in range(2))
    output = _add_forward(
        input, weight, bias, residual, eps, negative_slope, True, mean, var, running_mean, running_var, momentum
    )
    return output, mean, var


def add_evaluate(
    input: Tensor,  # (N, C) or (N, C, H, W)
    weight: Tensor | None,  # (C,)
    bias: Tensor | None,  # (C,)
    residual: Tensor,  # like input
    mean: Tensor,  # (C,)
    var: Tensor,  # (C,)
    eps: float,
    negative_slope: float,
) -> Tensor:
    """Output like ``input``, with fixed statistics."""
    mean, var = float32(mean), float32(var)
    return _add_forward(input, weight, bias, residual, eps, negative_slope, False, mean, var, None, None, 0.0)


def _add_forward(
    input, weight, bias, residual, eps, negative_slope, training, mean, var, running_mean, running_var, momentum
) -> Tensor:
    input, residual = native_layout(input), native_layout(residual)
    weight, bias = float32(weight), float32(bias)
    channels = input.shape[1]
    output = torch.empty_like(input)
    native.batch_norm_add_leaky_relu_forward(
        dtype_of(input), input.numel() // channels, channels, mean.shape[0] if training else 1, eps, negative_slope,
        training, input.data_ptr(), address(weight), address(bias), mean.data_ptr(), var.data_ptr(),
        address(running_mean), address(running_var), momentum, residual.data_ptr(), output.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return output


def add_backward(
    grad_output: Tensor,  # like input
    output: Tensor,  # like input
    input: Tensor,  # (N, C) or (N, C, H, W)
    weight: Tensor | None,  # (C,)
    bias: Tensor | None,  # (C,)
    mean: Tensor,  # (statistics_groups, C), or (C,) when not training
    var: Tensor,  # like mean
    training: bool,
    eps: float,
    negative_slope: float,
    statistics_groups: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of input (like it), weight and bias ((C,) float32), and residual (like input)."""
    grad_output, output, input = native_layout(grad_output), native_layout(output), native_layout(input)
    weight, bias = float32(weight), float32(bias)
    mean, var = float32(mean), float32(var)
    channels = input.shape[1]
    grad_input, grad_residual = torch.empty_like(input), torch.empty_like(input)
    grad_weight, grad_bias = empty_per_channel(weight, channels), empty_per_channel(bias, channels)
    native.batch_norm_add_leaky_relu_backward(
        dtype_of(input), input.numel() // channels, channels, statistics_groups, eps, negative_slope, training,
        grad_output.data_ptr(), output.data_ptr(), input.data_ptr(), address(weight), address(bias), mean.data_ptr(),
        var.data_ptr(), grad_input.data_ptr(), grad_weight.data_ptr(), grad_bias.data_ptr(), grad_residual.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return grad_input, grad_weight, grad_bias, grad_residual


library.impl("batch_norm_leaky_relu_train", train, "CPU")
library.impl("batch_norm_leaky_relu_eval", evaluate, "CPU")
library.impl("batch_norm_leaky_relu_backward", backward, "CPU")
library.impl("batch_norm_add_leaky_relu_train", add_train, "CPU")
library.impl("batch_norm_add_leaky_relu_eval", add_evaluate, "CPU")
library.impl("batch_norm_add_leaky_relu_backward", add_backward, "CPU")
