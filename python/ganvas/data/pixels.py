"""Arithmetic on pixels: uint8 to [-1, 1] and back, grey and RGB, resizing.

The network's range is [-1, 1]: x = p / 127.5 - 1, so black (0) is -1 and white (255) is 1, both exactly.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Rec. ITU-R BT.601 luma in thousandths, as Pillow's conversion to "L" has it.
LUMA = (299, 587, 114)
RESIZE_CHUNK = 2048
"""Images resized at a time, so that the float32 intermediates stay small beside the data set."""


def to_float(images: Tensor) -> Tensor:
    """(N, C, H, W) uint8 0..255 to float32 in [-1, 1], in channels_last memory order (the native kernels' layout)."""
    # Layout last: on a CPU, converting type and layout in one pass takes twice as long.
    return images.float().div_(127.5).sub_(1.0).contiguous(memory_format=torch.channels_last)


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] of any float dtype and shape to uint8 0..255, rounded; what lies outside is clamped."""
    return images.float().add(1.0).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)


def convert_channels(images: Tensor, channels: int) -> Tensor:
    """(N, 1 or 3, H, W) uint8 to (N, channels, H, W): grey is repeated, RGB becomes BT.601 luma."""
    if images.shape[1] == channels:
        return images
    if channels == 3:
        return images.repeat(1, 3, 1, 1)
    red, green, blue = (images[:, i : i + 1].to(torch.int32) for i in range(3))
    return ((LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue + 500) // 1000).to(torch.uint8)


def resize(images: Tensor, size: int) -> Tensor:
    """(N, C, H, W) uint8 to (N, C, size, size) uint8 by antialiased bicubic interpolation, rounded and clamped."""
    if tuple(images.shape[2:]) == (size, size):
        return images
    resized = images.new_empty((*images.shape[:2], size, size))
    for source, target in zip(images.split(RESIZE_CHUNK), resized.split(RESIZE_CHUNK)):
        pixels = F.interpolate(source.float(), size=(size, size), mode="bicubic", antialias=True)
        target.copy_(pixels.round_().clamp_(0, 255))
    return resized
