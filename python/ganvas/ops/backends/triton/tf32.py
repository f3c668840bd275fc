"""Rounding to TF32, float32 with 10 bits of mantissa: tensor cores cut off what does not fit.

That would be off by up to twice as much as the nearest, and always towards zero, which does not average out in a sum.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def rounded(values: Tensor) -> Tensor:
    """float32 ``values``, each the nearest that TF32 has, halves away from zero; NaN stays NaN."""
    bits = values.view(torch.int32)
    return torch.where(values.isnan(), values, bits.add(0x1000).bitwise_and_(-0x2000).view(torch.float32))


@triton.jit
def rounded_to_tf32(values):
    """The same in a kernel."""
    bits = values.to(tl.int32, bitcast=True)
    nearest = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return tl.where(values == values, nearest, values)
