"""Memory that ends, or begins, where an array does."""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor

_NO_ACCESS = 0


def fenced(tensor: Tensor, at_end: bool = True) -> Tensor:
    """A copy of the same strides; touching an element after it, or before it, is a segmentation fault."""
    size = tensor.numel() * tensor.element_size()
    pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, pages + mmap.PAGESIZE)
    begin = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    fence, offset = (begin + pages, pages - size) if at_end else (begin, mmap.PAGESIZE)
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(fence), mmap.PAGESIZE, _NO_ACCESS) == 0
    values = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
    return values.as_strided(tensor.shape, tensor.stride()).copy_(tensor)
