"""Native 2×2 max-pooling of stride 2 over a pending activation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ganvas import _native as native
from ganvas.ops.backends.arguments import address
from ganvas.ops.backends.cpu.arguments import dtype_of, empty, empty_pixels
from ganvas.ops.pending import Pending


def max_pool(input: Pending) -> tuple[Tensor, Tensor]:
    """The pooled activation (N, C, H // 2, W // 2), and which of each four it is, (N, C, H // 2, W // 2) uint8."""
    stored = input.stored
    batch, channels, height, width = stored.shape
    shape = (batch, channels, height // 2, width // 2)
    output = empty_pixels(shape, stored.dtype)
    index = empty_pixels(shape, torch.uint8)
    native.max_pool_forward(*_input_arguments(input), output.data_ptr(), index.data_ptr(), torch.get_num_threads())  # type: ignore[call-arg]
    return output, index


def max_pool_backward(grad_output: Tensor, index: Tensor, input: Pending) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the stored values, γ and β."""
    stored = input.stored
    grad_input = torch.empty_like(stored)
    of_weight, of_bias = empty(2, stored.shape[1]).unbind()
    native.max_pool_backward(  # type: ignore[call-arg]
        *_input_arguments(input), grad_output.data_ptr(), index.data_ptr(), input.batch_statistics, input.eps,
        address(input.weight), address(input.mean), address(input.var), grad_input.data_ptr(), of_weight.data_ptr(),
        of_bias.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return grad_input, of_weight, of_bias


def _input_arguments(input: Pending) -> Any:
    stored = input.stored
    assert input.scale is not None  # an activation that is written out is pooled by torch
    return (
        dtype_of(stored), stored.shape, input.scale.shape[0], stored.data_ptr(), address(input.scale),
        address(input.shift), input.negative_slope, input.activation_first,
    )  # fmt: skip
