"""Native C++ kernels for x86-64 (AVX-512, AVX2, portable) and aarch64 (portable), chosen when first used.

Importing this module registers the kernels for the schemas in :mod:`ganvas.ops.schemas`.
"""

from __future__ import annotations

import torch
from torch import Tensor

try:
    from ganvas import _native as native
except ImportError as error:  # a source tree that was not built: plain torch runs, and `ganvas info` says why
    native = None  # type: ignore[assignment]
    _missing = f"the native module is not there ({error}); install ganvas with pip to build it"
else:
    _missing = ""
    from ganvas.ops.backends.cpu import batch_norm_leaky_relu, gan_loss, linear
    from ganvas.ops.backends.cpu.chain import native_chain
    from ganvas.ops.backends.cpu.convolution import NativeConvolution, chosen_convolution, native_convolution
    from ganvas.ops.backends.cpu.max_pool import max_pool, max_pool_backward
    from ganvas.ops.backends.cpu.pending import (
        activate,
        activate_add,
        activate_add_backward,
        activate_backward,
        batch_normalised,
        channel_sums,
        settle,
        stays_pending,
    )
    from ganvas.ops.backends.cpu.transposition import to_channels_last, to_contiguous

DTYPES = (torch.float32, torch.bfloat16)


def can_run(op: str, tensor: Tensor) -> str | None:
    """None if the native kernel of ``op`` takes ``tensor``, otherwise the reason why not."""
    if native is None:
        return _missing
    if not tensor.is_cpu:
        return f"the native kernels take CPU tensors; got one on {tensor.device}"
    if tensor.dtype not in DTYPES:
        return f"the native kernels take float32 and bfloat16; got {tensor.dtype}"
    if op == "batch_norm_leaky_relu" and tensor.dim() == 3:
        return "a (N, C, L) tensor has no channels-last layout in torch"
    return None


__all__ = [
    "DTYPES",
    "NativeConvolution",
    "activate",
    "activate_add",
    "activate_add_backward",
    "activate_backward",
    "batch_norm_leaky_relu",
    "batch_normalised",
    "can_run",
    "channel_sums",
    "chosen_convolution",
    "gan_loss",
    "linear",
    "max_pool",
    "max_pool_backward",
    "native_chain",
    "native_convolution",
    "settle",
    "stays_pending",
    "to_channels_last",
    "to_contiguous",
]
