"""CUDA BatchNorm + LeakyReLU: one launch where values are few, otherwise a pass for the sums and one that writes."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ganvas import _native as native
from ganvas.ops.backends.arguments import address, float32
from ganvas.ops.backends.cuda.arguments import dtype_of, empty, empty_like, enqueue, workspace
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
    mean, var = (empty(input, statistics_groups, input.shape[1]) for _ in range(2))
    output = forward(
        input, weight, bias, None, eps, negative_slope, activation_first, True, mean, var, running_mean, running_var,
        momentum,
    )  # fmt: skip
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
    mean, var = float32(mean)[None], float32(var)[None]
    return forward(input, weight, bias, None, eps, negative_slope, activation_first, False, mean, var)


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
    mean, var = (empty(input, statistics_groups, input.shape[1]) for _ in range(2))
    output = forward(
        input, weight, bias, residual, eps, negative_slope, False, True, mean, var, running_mean, running_var, momentum
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
    mean, var = float32(mean)[None], float32(var)[None]
    return forward(input, weight, bias, residual, eps, negative_slope, False, False, mean, var)


def forward(
    input: Tensor,  # (N, C) or (N, C, H, W)
    weight: Tensor | None,  # (C,)
    bias: Tensor | None,  # (C,)
    residual: Tensor | None,  # like input
    eps: float,
    negative_slope: float,
    activation_first: bool,
    training: bool,
    mean: Tensor,  # (statistics_groups, C) float32, written in training, otherwise read
    var: Tensor,  # like mean
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    momentum: float = 0.0,
) -> Tensor:
    """All of the above, and fixed statistics of several groups."""
    input, weight, bias = native_layout(input), float32(weight), float32(bias)
    residual = None if residual is None else native_layout(residual)
    output = empty_like(input)
    shape = _shape(input, mean.shape[0])
    size = native.batch_norm_workspace_cuda(*shape, input.device.index) if training else 0
    scratch = workspace(input, size)
    enqueue(
        native.batch_norm_leaky_relu_forward_cuda, input, *shape, eps, negative_slope, activation_first, training,
        input.data_ptr(), address(weight), address(bias), mean.data_ptr(), var.data_ptr(), address(running_mean),
        address(running_var), momentum, address(residual), output.data_ptr(), address(scratch), size,
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
    grads = _backward(
        grad_output, None, input, weight, bias, mean, var, training, eps, negative_slope, activation_first,
        statistics_groups,
    )  # fmt: skip
    return grads[:3]


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
    *grads, grad_residual = _backward(
        grad_output, output, input, weight, bias, mean, var, training, eps, negative_slope, False, statistics_groups
    )
    assert grad_residual is not None
    return *grads, grad_residual  # type: ignore[return-value]


def _backward(
    grad_output, output, input, weight, bias, mean, var, training, eps, negative_slope, activation_first, groups
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    grad_output, input = native_layout(grad_output), native_layout(input)
    output = None if output is None else native_layout(output)
    weight, bias, mean, var = float32(weight), float32(bias), float32(mean), float32(var)
    grad_input, grad_residual = empty_like(input), None if output is None else empty_like(input)
    grad_weight, grad_bias = (empty(input, input.shape[1]) for _ in range(2))
    shape = _shape(input, groups)
    size = native.batch_norm_workspace_cuda(*shape, input.device.index)
    scratch = workspace(input, size)
    enqueue(
        native.batch_norm_leaky_relu_backward_cuda, input, *shape, eps, negative_slope, activation_first, training,
        grad_output.data_ptr(), address(output), input.data_ptr(), address(weight), address(bias), mean.data_ptr(),
        var.data_ptr(), grad_input.data_ptr(), grad_weight.data_ptr(), grad_bias.data_ptr(), address(grad_residual),
        address(scratch), size,
    )  # fmt: skip
    return grad_input, grad_weight, grad_bias, grad_residual


def _shape(input: Tensor, groups: int) -> tuple[Any, int, int, int]:
    channels = input.shape[1]
    return dtype_of(input), input.numel() // channels, channels, groups


library.impl("batch_norm_leaky_relu_train", train, "CUDA")
library.impl("batch_norm_leaky_relu_eval", evaluate, "CUDA")
library.impl("batch_norm_leaky_relu_backward", backward, "CUDA")
library.impl("batch_norm_add_leaky_relu_train", add_train, "CUDA")
library.impl("batch_norm_add_leaky_relu_eval", add_evaluate, "CUDA")
library.impl("batch_norm_add_leaky_relu_backward", add_backward, "CUDA")
