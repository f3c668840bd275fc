"""Maps between channels_last, in which convolutions read and write them, and contiguous memory, as dense layers do."""

from __future__ import annotations

import torch
from torch import Tensor

from ganvas.ops import checks
from ganvas.ops.backends import cpu
from ganvas.ops.backends.arguments import pixel_strides, plane_strides
from ganvas.ops.direct import runs_directly
from ganvas.ops.selection import choose

# Channels and pixels of a map, and numbers in all: below, torch copies as fast.
_LEAST_SIDE = 16
_LEAST_NUMBERS = 2**15


def flatten(input: Tensor) -> Tensor:
    """(N, C, H, W) as (N, C·H·W), as ``input.flatten(1)``: channels_last maps are copied, in one pass over memory.

    Args:
        input: float32 or bfloat16 on the CPU for the native copy; anything torch takes otherwise.

    Returns:
        Gradients of every order. That of the input is channels_last where the input is.
    """
    if input.dim() != 4 or not _is_turned(input, pixel_strides(input.shape)):
        return input.flatten(1)
    if torch.is_grad_enabled() and input.requires_grad:
        return _Flatten.apply(input)
    return cpu.to_contiguous(input).flatten(1)


def channels_last(input: Tensor) -> Tensor:
    """As :func:`ganvas.ops.checks.channels_last`, of a tensor to which no gradient flows back through the copy."""
    return cpu.to_channels_last(input) if _is_turned(input, plane_strides(input.shape)) else checks.channels_last(input)


def laid_out(gradient: Tensor, of: Tensor) -> Tensor:
    """A gradient, channels_last, as what it is ``of`` lies in memory: what made contiguous maps reads such gradients.

    As it is where no kernel copies it, or gradients of it are asked for.
    """
    turns = not torch.is_grad_enabled() and _is_turned(gradient, pixel_strides(gradient.shape))
    return cpu.to_contiguous(gradient) if turns and of.stride() == plane_strides(of.shape) else gradient


class _Flatten(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input):  # type: ignore[override]
        ctx.shape = input.shape
        return cpu.to_contiguous(input).flatten(1)

    @staticmethod
    def backward(ctx, grad_output):  # type: ignore[override]
        grad = grad_output.reshape(ctx.shape)
        return grad if torch.is_grad_enabled() else channels_last(grad)


def _is_turned(maps: Tensor, strides: tuple[int, ...]) -> bool:
    """Whether the native kernel copies maps, (N, C, H, W), that lie by these strides."""
    if maps.stride() != strides or not maps.is_cpu or not runs_directly(maps):
        return False
    _, channels, height, width = maps.shape
    if min(channels, height * width) < _LEAST_SIDE or maps.numel() < _LEAST_NUMBERS:
        return False
    return choose("layout", maps, None) == "cpu"
