"""What a chain is made of on an NVIDIA GPU: convolutions in Triton or torch, everything else in CUDA C++.

The names are those of :mod:`ganvas.ops.backends.cpu`, and how a gradient is left pending.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ganvas.ops.backends import cuda

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

if not cuda.MISSING:
    from ganvas.ops.backends.cuda import batch_norm_leaky_relu, gan_loss
    from ganvas.ops.backends.cuda.max_pool import max_pool, max_pool_backward
    from ganvas.ops.backends.cuda.pending import (
        activate,
        activate_add,
        activate_add_backward,
        activate_backward,
        settle,
    )
    from ganvas.ops.backends.cuda.statistics import batch_normalised
    from ganvas.ops.backends.gpu.convolution import chosen_convolution, native_convolution
    from ganvas.ops.backends.gpu.raw_gradient import pending_gradient, stays_pending

__all__ = [
    "DTYPES",
    "activate",
    "activate_add",
    "activate_add_backward",
    "activate_backward",
    "batch_norm_leaky_relu",
    "batch_normalised",
    "channel_sums",
    "chosen_convolution",
    "gan_loss",
    "max_pool",
    "max_pool_backward",
    "native_chain",
    "native_convolution",
    "pending_gradient",
    "settle",
    "stays_pending",
]


def channel_sums(values: Tensor) -> Tensor:
    """Over the pixels of (N, C, H, W): (C,) float32."""
    return values.sum((0, 2, 3), dtype=torch.float32)


def native_chain(*chain: object) -> None:
    """No chain is one call here: launches overlap with what Python does, and a graph leaves nothing of it."""
