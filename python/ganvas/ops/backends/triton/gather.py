"""Every convolution and its input gradient as one pattern, from which the kernels take where to read.

Along one axis the output is cut into ``out_stride`` phases: pixel o = out_stride*q + phase. Tap t of it reads input
pixel in_stride*q + offsets[phase] + step*t, or zero outside the input, for t < counts[phase]:

- a convolution has one phase and in_stride = stride;
- its input gradient, and a transposed convolution, have out_stride = stride, each phase with the taps that meet it;
- nearest-2× upsampling before a convolution is two phases on the small image, whose taps are sums of kernel taps
  (four 2×2 convolutions in place of one 3×3: 2.25× fewer operations).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor

from ganvas.ops.convolution import Geometry


class Axis(NamedTuple):
    """One direction of a :class:`Gather`."""

    in_stride: int
    out_stride: int
    step: int
    offsets: tuple[int, ...]  # of each phase
    counts: tuple[int, ...]  # taps of each phase; 0: the output is zero there
    taps: tuple[tuple[tuple[int, ...], ...], ...]  # of each phase and tap, which of the kernel's taps add up to it


@dataclass(frozen=True)
class Gather:
    """Where each output pixel reads, and which weight it multiplies there.

    Phases and taps are numbered row by row: phase (a, b) is a*x.out_stride + b, and tap (t, u) of it is
    t*x.counts[b] + u.
    """

    y: Axis
    x: Axis
    from_output: bool
    """The gather reads the convolution's output: it is the input gradient's."""

    @property
    def phases(self) -> int:
        return self.y.out_stride * self.x.out_stride

    @property
    def most_taps(self) -> int:
        """Of any phase."""
        return max(self.y.counts) * max(self.x.counts)

    def taps(self, phase: int) -> int:
        """Of one phase."""
        a, b = divmod(phase, self.x.out_stride)
        return self.y.counts[a] * self.x.counts[b]

    def pixels(self, phase: int, height: int, width: int) -> tuple[int, int]:
        """Rows and columns that a phase has in an output of this size."""
        a, b = divmod(phase, self.x.out_stride)
        return -(-(height - a) // self.y.out_stride), -(-(width - b) // self.x.out_stride)


@lru_cache(maxsize=4096)
def forward_gather(geometry: Geometry, kernel: tuple[int, int]) -> Gather:
    """Of a convolution's input, for its output. ``geometry.groups`` plays no part."""
    return _gather(geometry, kernel, False)


@lru_cache(maxsize=4096)
def backward_gather(geometry: Geometry, kernel: tuple[int, int]) -> Gather:
    """Of the gradient of a convolution's output, for its input's."""
    return _gather(geometry, kernel, True)


def pack_weight(weight: Tensor, gather: Gather, transposed: bool, dtype: torch.dtype) -> Tensor:
    """(phases, most_taps, channels read, channels written) of ``dtype``, any strides; what no phase has is undefined.

    Args:
        weight: (Cout, Cin, kH, kW), or (Cin, Cout, kH, kW) where the convolution is ``transposed``.
    """
    index = _selection(gather, _kernel(weight), weight.device)
    adds_up = index.shape[1] > 1
    rows = _by_tap(weight.float() if adds_up else weight.to(dtype), gather, transposed)
    packed = _combined(rows, index).to(dtype)
    return packed.unflatten(0, (gather.phases, gather.most_taps))


def unpack_weight_gradient(packed: Tensor, gather: Gather, transposed: bool, weight: Tensor) -> Tensor:
    """The gradient of ``weight``, like it, of its packed form's: (phases, most_taps, channels read, channels written).

    What no phase has is not read.
    """
    rows = _combined(packed.flatten(0, 1), _inverse_selection(gather, _kernel(weight), packed.device))
    gradient = torch.empty_like(weight, dtype=packed.dtype)
    _by_tap(gradient, gather, transposed).copy_(rows)
    return gradient


def _kernel(weight: Tensor) -> tuple[int, int]:
    return weight.shape[2], weight.shape[3]


def _by_tap(weight: Tensor, gather: Gather, transposed: bool) -> Tensor:
    """(kH*kW, channels read, channels written): a view, in either memory layout of a weight."""
    reads_first = transposed != gather.from_output
    return weight.flatten(2).permute(2, 0, 1) if reads_first else weight.flatten(2).permute(2, 1, 0)


def _combined(rows: Tensor, index: Tensor) -> Tensor:
    """Sums of the ``rows`` that each row of ``index`` names, where len(rows) stands for zero."""
    if index.shape[1] > 1:
        return torch.cat([rows, rows.new_zeros((1, *rows.shape[1:]))])[index].sum(1)
    if index.shape[0] == 0:  # every row as it is
        return rows
    return rows.index_select(0, index[:, 0])


@lru_cache(maxsize=4096)
def _selection(gather: Gather, kernel: tuple[int, int], device: torch.device) -> Tensor:
    """Of each phase and tap the numbers of the kernel's taps; (0, 1) where that is the kernel as it is.

    Kept on the device: nothing may be copied there while a graph is captured.
    """
    return _index(_kernel_taps(gather, kernel), kernel[0] * kernel[1], device)


@lru_cache(maxsize=4096)
def _inverse_selection(gather: Gather, kernel: tuple[int, int], device: torch.device) -> Tensor:
    """Of each of the kernel's taps the numbers of the packed ones that it is part of; (0, 1) likewise."""
    packed: list[list[int]] = [[] for _ in range(kernel[0] * kernel[1])]
    for row, taps in enumerate(_kernel_taps(gather, kernel)):
        for tap in taps:
            packed[tap].append(row)
    return _index(packed, gather.phases * gather.most_taps, device)


def _kernel_taps(gather: Gather, kernel: tuple[int, int]) -> list[list[int]]:
    """Of each phase and tap, in their order; empty for what a phase does not have."""
    rows = []
    for a in range(gather.y.out_stride):
        for b in range(gather.x.out_stride):
            of_phase = [
                [r * kernel[1] + s for r in rs for s in ss] for rs in gather.y.taps[a] for ss in gather.x.taps[b]
            ]
            rows.extend(of_phase + [[]] * (gather.most_taps - len(of_phase)))
    return rows


def _index(rows: list[list[int]], nothing: int, device: torch.device) -> Tensor:
    if rows == [[i] for i in range(nothing)]:
        return torch.empty((0, 1), dtype=torch.int64, device=device)
    width = max(map(len, rows))
    # Alone, a row that is nothing is read by nobody: any other may stand there.
    filler = nothing if width > 1 else 0
    return torch.tensor([row + [filler] * (width - len(row)) for row in rows], dtype=torch.int64, device=device)


def _gather(geometry: Geometry, kernel: tuple[int, int], from_output: bool) -> Gather:
    def axis(i: int) -> Axis:
        size, stride, padding, dilation = (of_axis[i] for of_axis in (kernel, *geometry[:3]))
        if geometry.upsampled:
            return _spread_upsampled(size, padding) if from_output else _upsampled(size, padding)
        if geometry.transposed != from_output:
            return _spread(size, stride, padding, dilation)
        return Axis(stride, 1, dilation, (-padding,), (size,), (tuple((r,) for r in range(size)),))

    return Gather(axis(0), axis(1), from_output)


def _spread(size: int, stride: int, padding: int, dilation: int) -> Axis:
    """Reads each i with o = stride*i - padding + dilation*r for a tap r."""
    offsets, taps = [], []
    for phase in range(stride):
        meeting = [r for r in range(size) if (phase + padding - dilation * r) % stride == 0]
        taps.append(tuple((r,) for r in meeting))
        offsets.append((phase + padding - dilation * meeting[0]) // stride if meeting else 0)
    step = -dilation // gcd(dilation, stride)
    return Axis(1, stride, step, tuple(offsets), tuple(map(len, taps)), tuple(taps))


def _upsampled(size: int, padding: int) -> Axis:
    """Reads i = floor((o - padding + r) / 2) for each tap r."""
    offsets, taps = [], []
    for phase in (0, 1):
        read = [(phase - padding + r) // 2 for r in range(size)]
        offsets.append(read[0])
        taps.append(tuple(tuple(r for r in range(size) if read[r] == i) for i in range(read[0], read[-1] + 1)))
    return Axis(1, 2, 1, tuple(offsets), tuple(map(len, taps)), tuple(taps))


def _spread_upsampled(size: int, padding: int) -> Axis:
    """Reads each o whose upsampled pixel o - padding + r is 2*i or 2*i + 1 for a tap r."""
    first = padding - (size - 1)
    taps = tuple(tuple(r for r in range(size) if first + t - padding + r in (0, 1)) for t in range(size + 1))
    return Axis(2, 1, 1, (first,), (size + 1,), (taps,))
