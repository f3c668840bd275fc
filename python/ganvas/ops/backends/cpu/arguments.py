"""How tensors become what native code takes: an address of memory that lies as the kernels expect it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ganvas import _native as native
from ganvas.ops.backends.arguments import pixel_strides

DTYPES = {torch.float32: native.Dtype.float32, torch.bfloat16: native.Dtype.bfloat16}
_CONVERTED = set(DTYPES)
_UNMAPPED_BYTES = 32 << 20  # from here on glibc maps each block by itself


def dtype_of(tensor: Tensor) -> native.Dtype:
    """The native name of ``tensor``'s dtype; TypeError for one that the kernels do not store."""
    try:
        return DTYPES[tensor.dtype]
    except KeyError:
        raise TypeError(f"the native kernels take float32 and bfloat16; got {tensor.dtype}") from None


def empty(*shape: int) -> Tensor:
    """Uninitialised float32 memory of the CPU, wherever torch's default device may be."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def empty_per_channel(like: Tensor | None, channels: int) -> Tensor:
    """The same, (C,), like a float32 tensor where there is one, which takes half the time."""
    return empty(channels) if like is None else torch.empty_like(like)


def in_dtypes(tensors: Sequence[Tensor | None], dtypes: Iterable[torch.dtype]) -> list[Tensor | None]:
    """Each in its dtype, those that are of another as copies that lie as they do; integers stay as they are."""
    results: list[Tensor | None] = []
    copies = []
    for tensor, dtype in zip(tensors, dtypes):
        if tensor is None or tensor.dtype is dtype or not tensor.is_floating_point():
            results.append(tensor)
        else:
            copy = torch.empty_like(tensor, dtype=dtype)
            results.append(copy)
            copies.append((tensor, copy))
    convert(copies)
    return results


def convert(copies: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Copies each first tensor to the second.

    Between float32 and bfloat16 in one native call for all: one by one in torch they take microseconds each.
    """
    calls: dict[torch.dtype, tuple[list[int], list[int], list[int]]] = {}
    for source, destination in copies:
        if {source.dtype, destination.dtype} == _CONVERTED and source.stride() == destination.stride():
            sources, destinations, counts = calls.setdefault(destination.dtype, ([], [], []))
            sources.append(source.data_ptr())
            destinations.append(destination.data_ptr())
            counts.append(source.numel())
        else:
            destination.copy_(source)
    for dtype, arguments in calls.items():
        native.convert(*arguments, DTYPES[dtype], torch.get_num_threads())


def halves(sums: Tensor) -> tuple[int, int]:
    """Where ``sums[0]`` and ``sums[1]`` begin, of contiguous float32."""
    begin = sums.data_ptr()
    return begin, begin + 2 * sums.numel()


def empty_pixels(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The same for (N, C, H, W), channels_last. By its strides it takes a third of the time that it takes by format."""
    return empty_maps(shape, pixel_strides(shape), dtype)


def empty_maps(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Uninitialised maps, of which the first axis is the outermost.

    Large ones lie in ganvas' own memory, whose pages stay. The C library gives theirs back to the system when they are
    freed, and new ones cost as much as a pass over them.
    """
    count = shape[0] * strides[0]
    if count * dtype.itemsize < _UNMAPPED_BYTES:
        return torch.empty_strided(shape, strides, dtype=dtype, device="cpu")
    memory = torch.frombuffer(native.Memory(count * dtype.itemsize), dtype=dtype, count=count)
    pixels = torch.empty(0, dtype=dtype, device="cpu")
    return pixels.set_(memory.untyped_storage(), 0, shape, strides)  # no view: it may be written to in place
