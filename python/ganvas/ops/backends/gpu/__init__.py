"""What a chain is made of on an NVIDIA GPU: convolutions in Triton or torch, everything else in CUDA C++.

The names are those of :mod:`ganvas.ops.backends.cpu`.
"""

from __future__ import annotations

import torch

from ganvas.ops.backends import cuda

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

if not cuda.MISSING:
    from ganvas.ops.backends.cuda import gan_loss

__all__ = ["DTYPES", "gan_loss"]
