"""CUDA 2×2 max-pooling of stride 2 over a pending activation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ganvas import _native as native
from ganvas.ops.backends.arguments import address
from ganvas.ops.backends.cuda.arguments import dtype_of, empty, empty_like, empty_pixels, enqueue, workspace
from ganvas.ops.pending import Pending


def max_pool(input: Pending) -> tuple[Tensor, Tensor]:
    """The pooled activation (N, C, H // 2, W // 2), and which of each four it is, (N, C, H // 2, W // 2) uint8."""
    stored = input.stored
    batch, channels, height, width = stored.shape
    shape = (batch, channels, height // 2, width // 2)
    output = empty_pixels(stored, shape, stored.dtype)
    index = empty_pixels(stored, shape, torch.uint8)
    enqueue(native.max_pool_forward_cuda, stored, *_input_arguments(input), output.data_ptr(), index.data_ptr())
    return output, index


def max_pool_backward(grad_output: Tensor, index: Tensor, input: Pending) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the stored values, γ and β."""
    stored = input.stored
    grad_input = empty_like(stored)
    of_weight, of_bias = empty(stored, 2, stored.shape[1])
    dtype, shape, groups, *others = _input_arguments(input)
    size = native.max_pool_workspace_cuda(dtype, shape, groups, stored.device.index)
    scratch = workspace(stored, size)
    enqueue(
        native.max_pool_backward_cuda, stored, dtype, shape, groups, *others, grad_output.data_ptr(), index.data_ptr(),
        input.batch_statistics, grad_input.data_ptr(), of_weight.data_ptr(), of_bias.data_ptr(), address(scratch), size,
    )  # fmt: skip
    return grad_input, of_weight, of_bias


def _input_arguments(input: Pending) -> Any:
    stored, mean = input.stored, input.mean
    assert mean is not None  # an activation that is written out is pooled by torch
    return (
        dtype_of(stored), stored.shape, mean.shape[0], stored.data_ptr(), address(input.weight), address(input.bias),
        mean.data_ptr(), address(input.var), input.eps, input.negative_slope, input.activation_first,
    )  # fmt: skip
