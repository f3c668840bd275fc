"""How tensors become what the CUDA kernels take: addresses of memory that lies as they expect it, and a stream."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ganvas import _native as native

_DTYPES = {
    torch.float32: native.Dtype.float32,
    torch.bfloat16: native.Dtype.bfloat16,
    torch.float16: native.Dtype.float16,
}


def dtype_of(tensor: Tensor) -> native.Dtype:
    """The native name of ``tensor``'s dtype; TypeError for one that the kernels do not store."""
    try:
        return _DTYPES[tensor.dtype]
    except KeyError:
        raise TypeError(f"the CUDA kernels take float32, bfloat16 and float16; got {tensor.dtype}") from None


def empty(like: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Uninitialised memory of ``like``'s device."""
    return torch.empty(shape, dtype=dtype, device=like.device)


def empty_pixels(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The same for (N, C, H, W), channels_last."""
    return torch.empty(shape, dtype=dtype, device=like.device, memory_format=torch.channels_last)


def empty_like(like: Tensor) -> Tensor:
    """The same of ``like``'s shape, dtype and layout."""
    return torch.empty_like(like)


def workspace(like: Tensor, size: int) -> Tensor | None:
    """Scratch of a launch, ``size`` bytes; None for none.

    Freed on return: whoever is given the memory next is behind the kernel on the stream.
    """
    return torch.empty((size,), dtype=torch.uint8, device=like.device) if size else None


def enqueue(kernel: Callable[..., None], like: Tensor, *arguments: object) -> None:
    """``kernel(*arguments, device, stream)`` on ``like``'s device and the current stream of it."""
    with torch.cuda.device_of(like):
        kernel(*arguments, like.device.index, torch.cuda.current_stream(like.device).cuda_stream)
