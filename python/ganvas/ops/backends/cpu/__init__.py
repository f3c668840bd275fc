"""Native C++ kernels for x86-64 (AVX-512, AVX2, portable) and aarch64 (portable), chosen when first used.

Importing this module registers the kernels for the schemas in :mod:`ganvas.ops.schemas`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active as are_functorch_transforms_active
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

try:
    from ganvas import _native as native
except ImportError as error:  # a source tree that was not built: plain torch runs, and `ganvas info` says why
    native = None  # type: ignore[assignment]
    _missing = f"the native module is not there ({error}); install ganvas with pip to build it"
else:
    _missing = ""
    from ganvas.ops.backends.cpu import batch_norm_leaky_relu, gan_loss, linear
    from ganvas.ops.backends.cpu.convolution import NativeConvolution, chosen_convolution, native_convolution
    from ganvas.ops.backends.cpu.max_pool import max_pool, max_pool_backward
    from ganvas.ops.backends.cpu.pending import (
        activate,
        activate_add,
        activate_add_backward,
        activate_backward,
        settle,
    )
    from ganvas.ops.backends.cpu.trial import Direction

_DTYPES = (torch.float32, torch.bfloat16)
_PLAIN = (Tensor, torch.nn.Parameter)


def can_run(op: str, tensor: Tensor) -> str | None:
    """None if the native kernel of ``op`` takes ``tensor``, otherwise the reason why not."""
    if native is None:
        return _missing
    if not tensor.is_cpu:
        return f"the native kernels take CPU tensors; got one on {tensor.device}"
    if tensor.dtype not in _DTYPES:
        return f"the native kernels take float32 and bfloat16; got {tensor.dtype}"
    if op == "batch_norm_leaky_relu" and tensor.dim() == 3:
        return "a (N, C, L) tensor has no channels-last layout in torch"
    return None


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


def holds(tensor: Tensor | None, shape: tuple[int, ...]) -> bool:
    """Whether the kernels find values of this shape where ``tensor`` says they are; None stands for the default."""
    if tensor is None:
        return True
    return tensor.shape == shape and tensor.is_cpu and (type(tensor) in _PLAIN or _is_traced(tensor))


def is_float32(values: Tensor) -> bool:
    """Whether the kernels can read and write ``values`` where they lie."""
    return values.dtype is torch.float32 and values.is_contiguous()


__all__ = [
    "Direction",
    "NativeConvolution",
    "activate",
    "activate_add",
    "activate_add_backward",
    "activate_backward",
    "batch_norm_leaky_relu",
    "can_run",
    "chosen_convolution",
    "gan_loss",
    "holds",
    "is_float32",
    "linear",
    "max_pool",
    "max_pool_backward",
    "native_convolution",
    "runs_as_operator",
    "runs_directly",
    "settle",
]
