"""How tensors become what native code takes, whatever the device."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor


@overload
def float32(values: Tensor) -> Tensor: ...
@overload
def float32(values: Tensor | None) -> Tensor | None: ...
def float32(values: Tensor | None) -> Tensor | None:
    """Per-channel parameters as the kernels read them. The caller keeps the result alive during the native call."""
    if values is None or (values.dtype is torch.float32 and values.is_contiguous()):
        return values
    return values.float().contiguous()


def to_dtype(values: Tensor, dtype: torch.dtype) -> Tensor:
    """``values.to(dtype)``, without the call where they are of that dtype: it costs as much as memory for them."""
    return values if values.dtype is dtype else values.to(dtype)


def pixel_strides(shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    """Of (N, C, H, W) in channels_last."""
    _, channels, height, width = shape
    return height * width * channels, 1, width * channels, channels


def plane_strides(shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    """Of (N, C, H, W), contiguous."""
    _, channels, height, width = shape
    return channels * height * width, height * width, width, 1


def address(tensor: Tensor | None) -> int:
    """Where ``tensor`` begins; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()
