"""Checks of options and inputs. They look at shapes and dtypes only, so they cost nothing beside a convolution."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def integer(name: str, value: Any, minimum: int = 1) -> int:
    """``value`` if it is an integer of at least ``minimum``; ValueError otherwise."""
    # Not isinstance: bool is an int to Python, but width=True is a mistake.
    if type(value) is not int or value < minimum:
        raise ValueError(f"{name} must be an integer of at least {minimum}, got {value!r}")
    return value


def images(images: Any, channels: int, size: int) -> None:
    """Raise unless ``images`` is a floating point (N, channels, size, size) tensor."""
    expected = f"images must be a floating point tensor of shape (N, {channels}, {size}, {size}) in [-1, 1]"
    _tensor(images, expected)
    if not images.is_floating_point() or images.dim() != 4 or images.shape[1:] != (channels, size, size):
        raise ValueError(f"{expected}, got {images.dtype} {tuple(images.shape)}")


def vectors(name: str, vectors: Any, length: int) -> None:
    """Raise unless ``vectors`` is a floating point (N, length) tensor."""
    expected = f"{name} must be a floating point tensor of shape (N, {length})"
    _tensor(vectors, expected)
    if not vectors.is_floating_point() or vectors.dim() != 2 or vectors.shape[1] != length:
        raise ValueError(f"{expected}, got {vectors.dtype} {tuple(vectors.shape)}")


def labels(labels: Any, num_classes: int | None, count: int) -> None:
    """Raise unless ``labels`` fit a network of ``num_classes`` classes (None: unconditional) and ``count`` images.

    The range is looked at on the CPU only: on a GPU the look would make the host wait for the stream at every step (and
    can't be captured in a CUDA graph), and there indexing with a wrong label raises by itself.
    """
    if num_classes is None:
        if labels is not None:
            raise ValueError("labels must be None: this network is unconditional (made with num_classes=None)")
        return
    expected = f"labels must be an int64 tensor of shape ({count},) with values in 0..{num_classes - 1}"
    if labels is None:
        raise ValueError(f"{expected}: this network is conditional, got None")
    _tensor(labels, expected)
    if labels.dtype != torch.int64 or labels.shape != (count,):
        raise ValueError(f"{expected}, got {labels.dtype} {tuple(labels.shape)}")
    if labels.device.type == "cpu" and count and not torch.compiler.is_compiling():
        low, high = (int(value) for value in labels.aminmax())
        if low < 0 or high >= num_classes:
            raise ValueError(f"{expected}, got values in {low}..{high}")


def _tensor(value: Any, expected: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{expected}, got {type(value).__name__}")
