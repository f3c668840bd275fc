"""The gradient of a convolution's weight, from pending activations and pending gradients, as one Triton kernel.

With the gather of the forward pass (:mod:`.gather`), of each phase:

    packed[tap, ci, co] = Σ over pixels  a[the pixel that the tap reads, ci] * d[pixel, co]

a and d are never stored: both are computed of what is, as it is loaded. The pixels are cut into parts, of which each
lies in one statistics group and leaves a float32 sum of its own; those are added in one order. Nothing is atomic.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ganvas.ops.backends.triton.gather import Gather, forward_gather, unpack_weight_gradient
from ganvas.ops.convolution import Geometry
from ganvas.ops.pending import Pending, PendingGradient

MOST_PARTIAL_BYTES = 64 * 2**20
"""Of all partial sums, unless one for each statistics group takes more."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LEAST_STEPS = 8  # of a part, so that what it writes does not outweigh what it reads
_MOST_PIXELS = 2**30  # of a part, and of one phase of an image: their sum is counted in 31 bits
_COLUMNS = 10  # of the table of phases


@dataclass(frozen=True)
class Configuration:
    """How the product is cut: a program sums block_taps*block_in rows by block_out columns, block_pixels at a time."""

    block_taps: int
    block_in: int
    block_out: int
    block_pixels: int
    num_warps: int
    num_stages: int
    programs: int
    """That are meant to run on each of the GPU's multiprocessors at a time: sets the number of parts."""


def configurations(gather: Gather, in_channels: int, out_channels: int, dtype: torch.dtype) -> list[Configuration]:
    """At most six that are worth measuring, the first of them the one taken without that.

    Few channels get small tiles of many taps, so that the output's gradient is read and computed for many taps at
    once; many get large ones, for the tensor cores. A tile of a float32 convolution has half the pixels of another.
    """
    rows, columns = gather.most_taps * in_channels, out_channels
    wide = rows >= 512 and columns >= 128
    narrow = [(64, 64, 64, 4, 3, 4), (128, 64, 32, 4, 3, 3), (64, 32, 64, 4, 3, 4), (128, 32, 64, 4, 2, 3)]
    large = [(128, 128, 32, 8, 3, 2), (128, 128, 64, 8, 2, 1), (128, 64, 64, 4, 3, 2), (64, 128, 64, 4, 3, 2)]
    found: list[Configuration] = []
    for size in [*large, *narrow[:2]] if wide else [*narrow, *large[2:]]:
        fitted = _fitted(gather, in_channels, out_channels, dtype, *size)
        if fitted not in found:
            found.append(fitted)
    return found


def _fitted(
    gather: Gather, in_channels: int, out_channels: int, dtype: torch.dtype,
    rows: int, columns: int, pixels: int, warps: int, stages: int, programs: int,
) -> Configuration:  # fmt: skip
    """No larger than the weight, no smaller than tl.dot takes."""
    block_in = min(triton.next_power_of_2(in_channels), rows)
    block_taps = min(triton.next_power_of_2(gather.most_taps), rows // block_in)
    block_in = max(block_in, 16 // block_taps)
    block_out = max(min(triton.next_power_of_2(out_channels), columns), 16)
    if dtype is torch.float32:
        pixels //= 2
    return Configuration(block_taps, block_in, block_out, pixels, warps, stages, programs)
