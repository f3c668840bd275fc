"""A convolution's geometry, and torch's own convolution by it: what every native kernel of one is measured against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Geometry(NamedTuple):
    """Arguments of ``conv2d`` or ``conv_transpose2d`` other than the tensors, as pairs (height, width)."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    transposed: bool = False
    output_padding: tuple[int, int] = (0, 0)
    groups: int = 1
    upsampled: bool = False
    """The input is first made twice as high and wide, each pixel repeated (nearest neighbour)."""

    def output_shape(self, input: torch.Size, weight: torch.Size) -> torch.Size:
        """Of (N, Cin, H, W) and a weight; sides below 1 where the kernel does not fit."""
        batch, _, height, width = input
        if self.upsampled:
            height, width = 2 * height, 2 * width
        height, width = self._output_side(0, height, weight[2]), self._output_side(1, width, weight[3])
        return torch.Size((batch, self.out_channels(weight), height, width))

    def _output_side(self, axis: int, side: int, kernel: int) -> int:
        stride, reach = self.stride[axis], self.dilation[axis] * (kernel - 1) - 2 * self.padding[axis]
        if self.transposed:
            return (side - 1) * stride + reach + self.output_padding[axis] + 1
        return (side - reach - 1) // stride + 1

    def named(self, weight: torch.Size) -> str:
        """What is computed, as ``ganvas info --tuning`` shows it."""
        kind = "upsample2_conv" if self.upsampled else "conv_transpose" if self.transposed else "conv"
        options = {
            "stride": (self.stride, (1, 1)),
            "padding": (self.padding, (0, 0)),
            "dilation": (self.dilation, (1, 1)),
            "output_padding": (self.output_padding, (0, 0)),
        }
        words = [f"{kind}{weight[2]}x{weight[3]}"]
        for name, ((height, width), default) in options.items():
            if (height, width) != default:
                words.append(f"{name}{height}" if height == width else f"{name}{height}x{width}")
        return "_".join(words)

    def in_channels(self, weight: torch.Size) -> int:
        """That a weight of this shape takes."""
        return weight[0] if self.transposed else weight[1] * self.groups

    def out_channels(self, weight: torch.Size) -> int:
        """That a weight of this shape makes."""
        return weight[1] * self.groups if self.transposed else weight[0]


def symmetric_padding(
    padding: str | tuple[int, int], kernel: Sequence[int], stride: tuple[int, int], dilation: tuple[int, int]
) -> tuple[int, int] | None:
    """Zeros on either side, also those that ``valid`` and ``same`` stand for; None where the sides differ.

    ``same`` has none with a stride, of which torch says that it does not take it.
    """
    if not isinstance(padding, str):
        return padding
    if padding == "valid":
        return (0, 0)
    if stride != (1, 1):
        return None
    height, width = (d * (k - 1) for d, k in zip(dilation, kernel))
    return None if height % 2 or width % 2 else (height // 2, width // 2)


def breaks_in_channels_last(weight: torch.Size, stride: tuple[int, ...]) -> bool:
    """Whether torch's gradient of such a weight is wrong, and writes past its memory, on channels_last tensors.

    So it is in oneDNN for a strided 1×1 convolution of fewer input channels than a block has, 8 with AVX2 and 16 with
    AVX-512: https://github.com/uxlfoundation/oneDNN/issues/6035. Contiguous tensors take another way.
    """
    return weight[1] < 16 and weight[2:].numel() == 1 and max(stride) > 1


def convolve(input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """(N, Cin, H, W) to (N, Cout, H', W') by torch; differentiable."""
    if geometry.upsampled:
        input = F.interpolate(input, scale_factor=2, mode="nearest")
    if breaks_in_channels_last(weight.shape, geometry.stride):
        input = input.contiguous()
    return torch.convolution(input, weight, bias, *geometry[:6])


def convolve_backward(
    grad_output: Tensor, input: Tensor, weight: Tensor, geometry: Geometry, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of input and weight by torch, those that ``needs`` asks for."""
    small = input
    if geometry.upsampled:
        input = F.interpolate(input, scale_factor=2, mode="nearest")
    if breaks_in_channels_last(weight.shape, geometry.stride):
        grad_output, input = grad_output.contiguous(), input.contiguous()
    grad_input, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad_output, input, weight, None, *geometry[:6], (*needs, False)
    )
    if geometry.upsampled and grad_input is not None:
        grad_input = torch.ops.aten.upsample_nearest2d_backward(grad_input, input.shape[2:], small.shape, 2.0, 2.0)
    return grad_input, grad_weight
