"""Pieces of several networks, as lists of layers: a FusedSequential fuses neighbours among its own children."""

from __future__ import annotations

from torch import Tensor, nn

from ganvas.nn import FusedSequential


def conv_bn_leaky_relu(
    in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1, negative_slope: float = 0.1
) -> list[nn.Module]:
    """Convolution (size kept for stride 1, halved for stride 2), BatchNorm, LeakyReLU."""
    # stride 2 with an even kernel needs one pixel of padding less than the odd kernel's "same".
    padding = (kernel_size - 1) // 2
    return [
        # The BatchNorm's own shift makes a bias redundant.
        nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.LeakyReLU(negative_slope),
    ]


class Residual(nn.Module):
    """x + block(x), the block two conv-BN-LeakyReLU of the same width (the form of DAVIDnet's, Page 2018)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.block = FusedSequential(*conv_bn_leaky_relu(width, width), *conv_bn_leaky_relu(width, width))

    def forward(self, input: Tensor) -> Tensor:
        return input + self.block(input)
