"""The convolutions that the Triton kernels are tested on, and what a gather says, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from ganvas.ops.backends.triton.gather import Gather
from ganvas.ops.convolution import Geometry

_STRIDE_2 = Geometry(stride=(2, 2), padding=(1, 1))
CONVOLUTIONS = {  # geometry, kernel
    "1x1": (Geometry(), (1, 1)),
    "1x1_stride2": (Geometry(stride=(2, 2)), (1, 1)),
    "3x3": (Geometry(padding=(1, 1)), (3, 3)),
    "3x3_padding0": (Geometry(), (3, 3)),
    "3x3_padding2": (Geometry(padding=(2, 2)), (3, 3)),
    "3x3_dilation2": (Geometry(padding=(2, 2), dilation=(2, 2)), (3, 3)),
    "3x3_stride2": (_STRIDE_2, (3, 3)),
    "4x4_stride2": (_STRIDE_2, (4, 4)),
    "4x4_padding0": (Geometry(), (4, 4)),
    "5x5": (Geometry(padding=(2, 2)), (5, 5)),
    "5x5_stride2": (Geometry(stride=(2, 2), padding=(2, 2)), (5, 5)),
    "1x3_stride1x2": (Geometry(stride=(1, 2), padding=(0, 1)), (1, 3)),
    "3x3_stride3_dilation2": (Geometry(stride=(3, 3), padding=(1, 1), dilation=(2, 2)), (3, 3)),
    "4x4_transposed": (_STRIDE_2._replace(transposed=True), (4, 4)),
    "4x4_transposed_stride1": (Geometry(transposed=True), (4, 4)),
    "3x3_transposed_output_padding": (_STRIDE_2._replace(transposed=True, output_padding=(1, 1)), (3, 3)),
    "3x3_upsampled": (Geometry(padding=(1, 1), upsampled=True), (3, 3)),
    "5x5_upsampled": (Geometry(padding=(2, 2), upsampled=True), (5, 5)),
    "4x4_upsampled": (Geometry(padding=(1, 1), upsampled=True), (4, 4)),
}


def weight_shape(geometry: Geometry, kernel: tuple[int, int], in_channels: int, out_channels: int) -> torch.Size:
    """Of a convolution from ``in_channels`` to ``out_channels``."""
    channels = (in_channels, out_channels) if geometry.transposed else (out_channels, in_channels)
    return torch.Size((*channels, *kernel))


def gathered(gather: Gather, input: Tensor, packed: Tensor, shape: torch.Size) -> Tensor:
    """(N, C, H, W) of ``shape``: what ``gather`` computes of ``input`` with packed weights."""
    output = input.new_zeros(shape)
    for phase in range(gather.phases):
        a, b = divmod(phase, gather.x.out_stride)
        rows, columns = gather.pixels(phase, *shape[2:])
        for tap in range(gather.taps(phase)):
            t, u = divmod(tap, gather.x.counts[b])
            ys = torch.arange(rows) * gather.y.in_stride + gather.y.offsets[a] + gather.y.step * t
            xs = torch.arange(columns) * gather.x.in_stride + gather.x.offsets[b] + gather.x.step * u
            read = _zero_padded(_zero_padded(input, ys, 2), xs, 3)
            target = output[:, :, a :: gather.y.out_stride, b :: gather.x.out_stride]
            target += torch.einsum("nihw,io->nohw", read, packed[phase, tap])
    return output


def _zero_padded(input: Tensor, positions: Tensor, dim: int) -> Tensor:
    inside = (positions >= 0) & (positions < input.shape[dim])
    read = input.index_select(dim, positions.clamp(0, input.shape[dim] - 1))
    return read * inside.view(-1, *[1] * (3 - dim)).to(input.dtype)
