"""The native kernels of a tensor's device, called the same way on each: what a chain is made of."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from ganvas.ops.backends import cpu, gpu


def kernels_of(tensor: Tensor) -> ModuleType:
    """:mod:`ganvas.ops.backends.cpu`, or :mod:`ganvas.ops.backends.gpu`, which has the same names."""
    return gpu if tensor.is_cuda else cpu
