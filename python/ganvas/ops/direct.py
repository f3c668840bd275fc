"""What lets a kernel be called straight on a tensor's memory, whatever its device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active as are_functorch_transforms_active
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

_PLAIN = (Tensor, torch.nn.Parameter)


def runs_directly(tensor: Tensor) -> bool:
    """Whether the kernel may be called without torch's dispatcher, whose way costs as much as a small layer.

    Not while something wants to see the operator: torch.compile, torch.export, torch.jit.trace, a function transform, a
    dispatch mode, a tensor subclass.
    """
    if type(tensor) not in _PLAIN or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return not is_in_torch_dispatch_mode() and not are_functorch_transforms_active()


def runs_as_operator(tensor: Tensor) -> bool:
    """Whether torch.compile or torch.export makes a graph, in which an operator may stand for the kernels."""
    return _is_traced(tensor) and not are_functorch_transforms_active()


def _is_traced(tensor: Tensor) -> bool:
    """Whether a graph is being made of ``tensor``. Dynamo shows its own type, torch.export without Dynamo a fake's."""
    return torch.compiler.is_compiling() and (type(tensor) in _PLAIN or type(tensor) is FakeTensor)


def holds(tensor: Tensor | None, shape: tuple[int, ...], device: torch.device) -> bool:
    """Whether the kernels find values of this shape where ``tensor`` says they are; None stands for the default."""
    if tensor is None:
        return True
    return tensor.shape == shape and tensor.device == device and (type(tensor) in _PLAIN or _is_traced(tensor))


def is_float32(values: Tensor) -> bool:
    """Whether the kernels can read and write ``values`` where they lie."""
    return values.dtype is torch.float32 and values.is_contiguous()
