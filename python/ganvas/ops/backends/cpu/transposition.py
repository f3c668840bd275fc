"""Maps in another memory layout, by the native transposition (csrc/cpu/transposition.h)."""

from __future__ import annotations

import torch
from torch import Tensor

from ganvas import _native as native
from ganvas.ops.backends.arguments import pixel_strides, plane_strides
from ganvas.ops.backends.cpu.arguments import dtype_of, empty_maps


def to_channels_last(maps: Tensor) -> Tensor:
    """(N, C, H, W), contiguous, in channels_last."""
    _, channels, height, width = maps.shape
    return _transposed(maps, channels, height * width, pixel_strides(maps.shape))


def to_contiguous(maps: Tensor) -> Tensor:
    """(N, C, H, W), channels_last, contiguous."""
    _, channels, height, width = maps.shape
    return _transposed(maps, height * width, channels, plane_strides(maps.shape))


def _transposed(maps: Tensor, rows: int, columns: int, strides: tuple[int, ...]) -> Tensor:
    result = empty_maps(maps.shape, strides, maps.dtype)
    native.transpose(
        dtype_of(maps), maps.shape[0], rows, columns, maps.data_ptr(), result.data_ptr(), torch.get_num_threads()
    )
    return result
